"""Building equations: equal ones are one, trivial ones none, and one may be put in after the fact."""

import torch

from mlc.ir.builder import Builder
from mlc.ir.core import Random, Stop, aten
from mlc.ir.types import TensorType

T = TensorType(torch.float64, (2,), (1,), torch.device("cpu"))


def test_a_value_is_split_where_it_was_made() -> None:
    """Whoever read it goes on doing so; positions and producers are those of the new order."""
    b = Builder(merge=False)
    x = b.input(T)
    (y,) = b.emit(aten("sin"), (x,), (T,))
    (z,) = b.emit(aten("mul", "Tensor"), (y, y), (T,))
    y.mask = 4
    new = b.split(y, Stop(1), None, "hook")
    assert [e.op for e in b.eqns] == [aten("sin"), Stop(1), aten("mul", "Tensor")]
    assert (b.eqns[0].outs, b.eqns[1].args, b.eqns[1].outs) == ((new,), (new,), (y,))
    assert [b.position[v] for v in (x, new, y, z)] == [-1, 0, 1, 2]
    assert [b.producer(v) for v in (new, y, z)] == b.eqns
    assert new.mask == 4
    assert b.eqns[2].args == (y, y)


def test_equal_equations_are_one_unless_they_draw() -> None:
    b = Builder()
    x = b.input(T)
    assert b.emit(aten("sin"), (x,), (T,)) == b.emit(aten("sin"), (x,), (T,)) != b.emit(aten("cos"), (x,), (T,))
    layout = (T.shape, T.stride, T.dtype, T.device)
    draws = [b.emit(Random(aten("uniform_"), fill=True), (*layout, 0, 1), (T,)) for _ in range(2)]
    assert draws[0] != draws[1]
    assert len(b.region([x]).eqns) == 2  # the draws stay: they move a generator


def test_zeros_simplify_only_what_they_leave_as_it_is() -> None:
    b = Builder()
    x, zero = b.input(T), b.zero(T)
    add, sub, mul = aten("add", "Tensor"), aten("sub", "Tensor"), aten("mul", "Tensor")
    assert b.emit(add, (x, zero), (T,)) == b.emit(add, (zero, x), (T,)) == b.emit(sub, (x, zero), (T,)) == (x,)
    assert b.emit(mul, (x, zero), (T,)) == (zero,) == b.emit(aten("neg"), (zero,), (T,))
    assert b.emit(sub, (zero, x), (T,)) != (x,)  # its negative
    assert b.emit(add, (zero, x), (T,), (("alpha", 2),)) != (x,)
    other = TensorType(torch.float64, (3, 2), (2, 1), T.device)
    assert b.emit(add, (x, b.zero(other)), (other,)) != (x,)  # broadcast
    assert b.add(None, x) is x and b.add(zero, x) is x and b.add(x, zero) is x


def test_products_with_zeros_are_zeros() -> None:
    """Recorded formulas of tangents are full of them: data has no tangent, and PyTorch fills in zeros."""
    b = Builder()

    def typed(*shape: int) -> TensorType:
        return TensorType(torch.float64, shape, tuple(torch.empty(shape).stride()), T.device)

    m, image, kernel, out = typed(2, 2), typed(1, 1, 4, 4), typed(1, 1, 3, 3), typed(1, 1, 2, 2)
    w, g = b.input(kernel), b.input(out)
    y, bias, none = b.input(m), b.input(typed(1)), b.zero(image)
    assert b.emit(aten("mm"), (y, b.zero(m)), (m,)) == (b.zero(m),) == b.emit(aten("mm"), (b.zero(m), y), (m,))
    rest = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    conv, back = aten("convolution"), aten("convolution_backward")
    assert b.emit(conv, (none, w, None, *rest), (out,)) == (b.zero(out),)
    assert b.emit(conv, (none, w, bias, *rest), (out,)) != (b.zero(out),)
    for mask, types in (([False, True, False], (kernel,)), ([True, False, False], (image,))):
        found = b.emit(back, (g, none, w, [1], *rest, mask), types)
        assert (found == (b.zero(kernel),)) == mask[1]  # the input's gradient does not read the input
    both = b.emit(back, (g, none, b.zero(kernel), [1], *rest, [True, True, False]), (image, kernel))
    assert both == (b.zero(image), b.zero(kernel))
    assert b.emit(back, (g, none, w, [1], *rest, [False, True, True]), (kernel, typed(1))) != both
