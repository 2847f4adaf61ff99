"""Value numbering: equal numbers for the same function of the same inputs, and for nothing else."""

import torch

from mlc.ir.builder import Builder
from mlc.ir.core import Alias, Random, Stop, Var, aten
from mlc.ir.types import TensorType
from mlc.passes.remat.numbering import Numbering
from tests.passes.regions import emit

T = TensorType.of(torch.rand(4))


def numbers_of(b: Builder, *values: Var) -> list[int]:
    region = b.region(list(values))
    found = Numbering().region(region, {})
    return [found[v] for v in region.outputs]


def test_the_same_operator_on_the_same_values_has_one_number() -> None:
    b = Builder(merge=False)
    x, y = b.input(T), b.input(T)
    same = [emit(b, "mul", x, y, overload="Tensor") for _ in range(2)]
    other = emit(b, "mul", y, x, overload="Tensor")
    one, two, three = numbers_of(b, *same, other)
    assert one == two != three


def test_literals_and_keyword_arguments_count() -> None:
    b = Builder(merge=False)
    x, y = b.input(T), b.input(T)
    found = [emit(b, "add", x, y, overload="Tensor"), emit(b, "add", x, y, overload="Tensor", alpha=2)]
    found += [emit(b, "add", x, y, overload="Tensor", alpha=3), emit(b, "clamp", x, 0.0), emit(b, "clamp", x, -0.0)]
    assert len(set(numbers_of(b, *found))) == 5


def test_another_name_is_no_other_value() -> None:
    b = Builder(merge=False)
    x = b.input(T)
    y = emit(b, "sin", x)
    (a,) = b.emit(Alias(), (y,), (T,))
    (s,) = b.emit(Stop(), (y,), (T,))
    assert len(set(numbers_of(b, y, a, s))) == 1


def test_two_draws_are_two_values() -> None:
    b = Builder(merge=False)
    layout = (T.shape, T.stride, T.dtype, T.device)
    draws = [b.emit(Random(aten("uniform_"), fill=True), (*layout, 0, 1), (T,))[0] for _ in range(2)]
    assert len(set(numbers_of(b, *draws))) == 2


def test_numbers_are_shared_between_regions_through_their_inputs() -> None:
    numbering = Numbering()
    found = []
    start: list[int] = []
    for _ in range(2):
        b = Builder()
        x, y = b.input(T), b.input(T)
        region = b.region([emit(b, "sin", x), emit(b, "sin", y)])
        start = start or [numbering.fresh()]
        numbers = numbering.region(region, {x: start[0]})
        found.append([numbers[v] for v in region.outputs])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]
