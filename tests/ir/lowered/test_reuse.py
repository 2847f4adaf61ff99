"""In-place reuse: only dying, sole, dense storages of the region itself are written over."""

import torch

from mlc.ir.core import Eqn, Loop, Pack, Region, Stop, Var, aten
from mlc.ir.lowered.reuse import reused
from mlc.ir.types import SeqType, TensorType

ADD, MUL, NEG = aten("add", "Tensor"), aten("mul", "Tensor"), aten("neg")


def f32(*shape: int, stride: tuple[int, ...] | None = None) -> TensorType:
    plain = tuple(torch.empty(shape).stride())
    return TensorType(torch.float32, shape, plain if stride is None else stride, torch.device("cpu"))


def test_a_dying_result_is_written_over() -> None:
    x, a, b = Var(f32(4)), Var(f32(4)), Var(f32(4))
    r = Region((x,), (Eqn(NEG, (x,), (a,)), Eqn(MUL, (x, a), (b,))), (b,))
    assert reused(r) == {1: a}


def test_inputs_outputs_and_values_read_later_are_not() -> None:
    x, a, b, c = (Var(f32(4)) for _ in range(4))
    assert reused(Region((x,), (Eqn(NEG, (x,), (a,)),), (a,))) == {}
    later = (Eqn(NEG, (x,), (a,)), Eqn(NEG, (a,), (b,)), Eqn(ADD, (a, b), (c,)))
    assert reused(Region((x,), later, (c,))) == {2: a}
    assert reused(Region((x,), later[:2], (a, b))) == {}


def test_another_view_of_the_storage_forbids_it() -> None:
    x, a, v, b, c = Var(f32(4)), Var(f32(4)), Var(f32(2, 2)), Var(f32(4)), Var(f32(2, 2))
    view = Eqn(aten("view"), (a, [2, 2]), (v,))
    r = Region((x,), (Eqn(NEG, (x,), (a,)), view, Eqn(NEG, (a,), (b,)), Eqn(NEG, (v,), (c,))), (b, c))
    assert 2 not in reused(r)


def test_expanded_values_are_not_even_behind_a_stop_that_hides_it() -> None:
    x, a, wide, stopped, b = Var(f32(1)), Var(f32(1)), Var(f32(4, stride=(0,))), Var(f32(4)), Var(f32(4))
    eqns = (
        Eqn(NEG, (x,), (a,)), Eqn(aten("expand"), (a, [4]), (wide,)), Eqn(Stop(1), (wide,), (stopped,)),
        Eqn(NEG, (stopped,), (b,)),
    )  # fmt: skip
    assert reused(Region((x,), eqns, (b,))) == {}


def test_a_sequence_holds_on_to_its_elements() -> None:
    x, a, b = Var(f32(4)), Var(f32(4)), Var(f32(4))
    seq = Var(SeqType(f32(4), 1))
    eqns = (Eqn(NEG, (x,), (a,)), Eqn(Pack(), (a,), (seq,)), Eqn(NEG, (a,), (b,)))
    assert reused(Region((x,), eqns, (b, seq))) == {}


def test_another_shape_or_dtype_is_not() -> None:
    x, a, b = Var(f32(4)), Var(f32(4)), Var(f32(3, 4))
    y = Var(f32(3, 1))
    r = Region((x, y), (Eqn(NEG, (x,), (a,)), Eqn(MUL, (a, y), (b,))), (b,))
    assert reused(r) == {}


def test_what_a_loop_emits_of_its_operands_is_held() -> None:
    """A state is emitted before the trip that changes it: the first one is the operand itself."""
    x, a, end, out = Var(f32(4)), Var(f32(4)), Var(f32(4)), Var(f32(4))
    before, after, states = Var(f32(4)), Var(f32(4)), Var(SeqType(f32(4), 2))
    step = Eqn(NEG, (before,), (after,))
    for emitted, written in ((before, {}), (after, {2: a})):
        loop = Loop(Region((before,), (step,), (after, emitted)), 1, 0, 2)
        eqns = (Eqn(NEG, (x,), (a,)), Eqn(loop, (a,), (end, states)), Eqn(NEG, (a,), (out,)))
        assert reused(Region((x,), eqns, (out, end, states))) == written


def test_what_a_loop_hands_on_and_emits_a_trip_later_is_held() -> None:
    x, a, b, one, two, out = (Var(f32(4)) for _ in range(6))
    first, second, states = Var(f32(4)), Var(f32(4)), Var(SeqType(f32(4), 2))
    loop = Loop(Region((first, second), (), (second, second, first)), 2, 0, 2)
    eqns = (
        Eqn(NEG, (x,), (a,)), Eqn(NEG, (x,), (b,)), Eqn(loop, (a, b), (one, two, states)), Eqn(NEG, (b,), (out,)),
    )  # fmt: skip
    assert reused(Region((x,), eqns, (out, states))) == {}
