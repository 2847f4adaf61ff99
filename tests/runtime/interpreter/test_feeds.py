"""What loops draw: batches once, numbers again from the state they were drawn at; generators stay where they were."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mlc
from mlc.ir.core import Draw, EffectCall, NestedEffects, Random, aten
from mlc.ir.types import TensorType
from mlc.runtime.interpreter.feeds import Drawer, Stale, Tape

T = TensorType.of(torch.rand(3, dtype=torch.float64))
LAYOUT = (T.shape, T.stride, T.dtype, T.device)


def uniform(generator: Any = None) -> EffectCall:
    kw = () if generator is None else (("generator", generator),)
    return EffectCall(Random(aten("uniform_"), fill=True), (*LAYOUT, 0.0, 1.0), kw, (T,))


def drawer(items: list[Tensor]) -> tuple[Drawer, list[int]]:
    opened: list[int] = []

    def opens(source: int, visit: int) -> Iterator[Tensor]:
        opened.append(visit)
        return iter(items)

    return Drawer(opens, lambda item: [item]), opened


@pytest.mark.parametrize("own", [False, True])
def test_random_numbers_come_again_and_the_generator_stays(own: bool) -> None:
    g = torch.Generator().manual_seed(7) if own else None
    torch.manual_seed(7)
    want = [torch.empty(3, dtype=torch.float64).uniform_(generator=g) for _ in range(4)]
    if g is not None:
        g.manual_seed(7)
    torch.manual_seed(7)
    tape = Tape((uniform(g),), 4, drawer([])[0])
    first = [tape.at(t)[0] for t in range(4)]
    where = torch.get_rng_state() if g is None else g.get_state()
    for t in (3, 1, 2, 0, 1):
        assert torch.equal(tape.at(t)[0], want[t])
        assert torch.equal(torch.get_rng_state() if g is None else g.get_state(), where)
    assert all(torch.equal(a, b) for a, b in zip(first, want, strict=True))


def test_a_trip_draws_in_the_order_of_the_loop() -> None:
    """Batch, number, batch, numbers of an inner loop: replayed, nothing is drawn from the iterable again."""
    items = [torch.full((3,), float(i), dtype=torch.float64) for i in range(6)]
    source, opened = drawer(items)
    batch = EffectCall(Draw(0, 0), (), (), (T,))
    tape = Tape((batch, uniform(), batch, NestedEffects((uniform(),), 2)), 3, source)
    torch.manual_seed(1)
    found = [tape.at(t) for t in range(3)]
    assert [[int(x[0]) for x in (row[0], row[2])] for row in found] == [[0, 1], [2, 3], [4, 5]]
    torch.manual_seed(1)
    for row in found:
        for x in (row[1], *row[3]):
            assert torch.equal(x, torch.empty(3, dtype=torch.float64).uniform_())
    for t in (2, 0, 1):
        again = tape.at(t)
        for a, b in zip([*again[:3], *again[3]], [*found[t][:3], *found[t][3]], strict=True):
            assert torch.equal(a, b)
    assert opened == [0]
    with pytest.raises(Stale, match="ended earlier"):
        tape.at(3)


def test_numbers_behind_a_batch_that_draws_itself_come_again() -> None:
    """Taking the batch moves the generator, replaying it does not."""
    source = Drawer(lambda source, visit: (torch.rand(3, dtype=torch.float64) for _ in range(9)), lambda item: [item])
    batch = EffectCall(Draw(0, 0), (), (), (T,))
    tape = Tape((uniform(), batch, uniform(), batch, uniform()), 3, source)
    found = [tape.at(t) for t in range(3)]
    for t in (2, 0, 1):
        assert all(torch.equal(a, b) for a, b in zip(tape.at(t), found[t], strict=True))


def test_a_batch_that_is_written_to_is_noticed_when_it_comes_again() -> None:
    items = [torch.rand(3, dtype=torch.float64) for _ in range(2)]
    tape = Tape((EffectCall(Draw(0, 0), (), (), (T,)),), 2, drawer(items)[0])
    for t in range(2):
        tape.at(t)
    items[0].add_(1)
    with pytest.raises(mlc.DifferentiationError, match="in-place"):
        tape.at(0)


def test_an_item_of_another_shape_is_stale() -> None:
    tape = Tape((EffectCall(Draw(0, 0), (), (), (T,)),), 2, drawer([torch.rand(4, dtype=torch.float64)])[0])
    with pytest.raises(Stale, match="another shape"):
        tape.at(0)
