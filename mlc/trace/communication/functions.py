"""The functions of ``torch.distributed.nn.functional``: collectives whose derivative PyTorch's own graph has.

They are custom ``autograd.Function`` classes of PyTorch's.  One that is called in the loop runs as it is, so that the
engine finds it; its result is recorded as a collective of the program, whose rules say the same: the derivative of the
sum over processes (:mod:`mlc.passes.rules.collectives`).  Where PyTorch's formula is another one, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlc.errors import CaptureError
from mlc.ir.builder import contiguous
from mlc.ir.communication.collectives import operator
from mlc.ir.core import Var
from mlc.ir.types import TensorType
from mlc.trace.communication.collectives import described, reduction, roll, run_collective

__all__ = ["MODULE", "differentiable"]

MODULE = "torch.distributed.nn.functional"
_A: Any = torch.ops.aten


@dataclass(frozen=True)
class _Call:
    """What one of the functions does.

    Attributes:
        name: The collective.
        rest: Its literals but the group.
        group: The process group.
        given: The tensors it communicates; several are the parts of one value.
        written: Tensors that it writes its results to.
        rows: Whether each row of the value and of the result is a tensor of its own.
    """

    name: str
    rest: tuple[Any, ...]
    group: Any
    given: tuple[Tensor, ...]
    written: tuple[Tensor, ...] = ()
    rows: bool = False


def _world(group: Any) -> Any:
    return group if group is not None else dist.group.WORLD


def _all_reduce(ob: Any, op: Any, group: Any, x: Tensor) -> _Call:
    return _Call("all_reduce", (reduction(ob, op),), _world(group), (x,))


def _all_gather(ob: Any, group: Any, x: Tensor) -> _Call:
    g = _world(group)
    return _Call("all_gather", (g.size(),), g, (x,), rows=True)


def _reduce_scatter(ob: Any, op: Any, group: Any, out: Tensor, *parts: Tensor) -> _Call:
    g = _world(group)
    return _Call("reduce_scatter", (reduction(ob, op), g.size()), g, parts, (out,), rows=True)


def _broadcast(ob: Any, source: int, group: Any, x: Tensor) -> _Call:
    g = _world(group)
    return _Call("broadcast", (dist.get_group_rank(g, source),), g, (x,))


def _all_to_all(ob: Any, group: Any, outs: Sequence[Tensor], *parts: Tensor) -> _Call:
    return _Call("all_to_all", (), _world(group), parts, tuple(outs), rows=True)


def _all_to_all_single(ob: Any, group: Any, out: Tensor, to: Any, come: Any, x: Tensor) -> _Call:
    g = _world(group)
    if len({*(to or ()), *(come or ())}) > 1 or x.shape[0] % g.size():
        raise CaptureError("all_to_all_single of unequal parts", loc=ob.place(), advice="pad them to one size")
    return _Call("all_to_all", (), g, (x,), (out,))


_FUNCTIONS: dict[str, Callable[..., _Call]] = {
    "_AllReduce": _all_reduce, "_AllGather": _all_gather, "_Reduce_Scatter": _reduce_scatter, "_Broadcast": _broadcast,
    "_AlltoAll": _all_to_all, "_AlltoAllSingle": _all_to_all_single,
}  # fmt: skip


def differentiable(ob: Any, cls: Any, apply: Callable[..., Any], args: Any) -> Any:
    """Run and record ``cls.apply(*args)``.

    Raises:
        CaptureError: where a program has no such operator, or PyTorch's derivative of it is not the true one.
    """
    found = _FUNCTIONS.get(cls.__name__)
    if found is None or ob.nested:
        raise CaptureError(
            f"{cls.__name__.strip('_').lower()} of {MODULE} in the loop: no operation of a program", loc=ob.place(),
            advice="use all_reduce, all_gather, reduce_scatter, broadcast or all_to_all",
        )  # fmt: skip
    c = found(ob, *args)
    if len({(x.shape, x.dtype) for x in c.given}) > 1:
        raise CaptureError(f"{c.name} of parts of several shapes", loc=ob.place(), advice="pad them to one shape")
    if torch.is_grad_enabled() and any(ob.carries(x, ob.handle(x)) for x in c.given):
        return _followed(ob, c, lambda: apply(cls, *args))
    return _constant(ob, c)


def _constant(ob: Any, c: _Call) -> Any:
    """Nothing is differentiated by PyTorch."""
    with ob.active():
        x = torch.stack(c.given) if c.rows else c.given[0]
    y = run_collective(ob, c.name, x, *c.rest, group=c.group)
    with ob.active():
        outs = y.unbind(0) if c.rows else (y,)
        if c.written:
            outs = tuple(w.copy_(o.reshape(w.shape)) for w, o in zip(c.written, outs, strict=True))
    return outs if c.name in ("all_gather", "all_to_all") and c.rows else outs[0]


def _followed(ob: Any, c: _Call, run: Callable[[], Any]) -> Any:
    """PyTorch's graph goes through it."""
    if c.name in ("all_reduce", "reduce_scatter") and c.rest[0] != "sum":
        raise CaptureError(
            f"a {c.name} by {c.rest[0]} is differentiated, which PyTorch gets wrong", loc=ob.place(),
            advice="reduce by SUM, and divide by the number of processes",
        )  # fmt: skip
    x = c.given[0]
    shape = (len(c.given), *x.shape) if c.rows else x.shape
    roll(ob, c.group, described(c.name, x.detach().new_empty(shape), *c.rest))
    values = tuple(ob.read(t, True) for t in c.given)
    for w in c.written:
        ob.will_write(w)
    with ob.pause():
        out = run()
    outs = [out] if isinstance(out, Tensor) else list(out)
    plain = TensorType(x.dtype, tuple(shape), contiguous(tuple(shape)), x.device)
    value: Var = values[0]
    if c.rows:
        (value,) = ob.emit(_A.stack.default, (list(values),), (plain,))
    n = len(outs)
    whole = (n, *outs[0].shape) if c.rows else tuple(outs[0].shape)
    made = TensorType(x.dtype, whole, contiguous(tuple(whole)), x.device)
    if (not c.rows and c.name == "all_reduce") or c.name == "broadcast":
        made = plain if isinstance(value.type, TensorType) and value.type.stride == plain.stride else value.type  # type: ignore[assignment]
    (y,) = ob.emit(operator(c.name), (value, *c.rest, c.group.group_name), (made,))
    for i, t in enumerate(outs):
        v = y
        if c.rows:
            (v,) = ob.emit(_A.select.int, (y, 0, i), (TensorType.of(t),))
        ob.bind(t, v)
    return out
