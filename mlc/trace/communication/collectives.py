"""Communication in the user's loop: collectives of ``torch.distributed`` become equations, all else is refused.

Whatever a loop calls (``dist.all_reduce``, a functional collective, a module that communicates) reaches the dispatcher
as one operator of the namespaces ``c10d`` or ``_c10d_functional``.  It is run, and recorded, as the functional
operators of :mod:`mlc.ir.communication.collectives`; an in-place collective then writes its result, like any other
in-place operator.  Handles of ``async_op=True`` are complete when they are given out.

What PyTorch's autograd does not follow stays so for the loop's own gradients: ``dist.all_gather`` of something that
requires grad gives constants, as there.  ``dist.all_reduce`` of a tensor *in* PyTorch's graph is worse, its backward
takes it for the identity: such a value may be returned (its derivative is the right one), but a gradient that the loop
itself takes through it is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlc.errors import CaptureError
from mlc.ir.communication.collectives import operator
from mlc.ir.inplace import by_name
from mlc.ir.literals import type_text
from mlc.ir.types import TensorType
from mlc.runtime.collectives import REDUCTIONS, group_named

__all__ = [
    "COMMUNICATION",
    "FUNCTIONAL",
    "communicate",
    "described",
    "followed",
    "reduction",
    "refuse_sharded",
    "roll",
    "run_collective",
]

COMMUNICATION = frozenset(
    {"c10d", "_c10d_functional", "_c10d_functional_autograd", "fsdp", "symm_mem", "_dtensor", "c10d_functional"}
)
FUNCTIONAL = "GeneratedBackwardFor__c10d_functional"  # how PyTorch names autograd's nodes of functional collectives
Handler = Callable[[Any, dict[str, Any]], Any]


def communicate(ob: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Run and record one operator that communicates.

    Args:
        ob: The recorder.
        func: The operator.
        args: Of it.
        kwargs: Of it.

    Raises:
        CaptureError: where it is none of those that a program has.
        CommunicationError: where other processes are about to do something else.
    """
    name = func._schema.name
    handler = _HANDLERS.get(name)
    given = by_name(func, args, kwargs)
    if handler is None:
        what, advice = _ADVICE.get(name.split("::")[1].rstrip("_"), (None, None))
        if name.startswith("fsdp::"):
            what, advice = "fully_shard", _SHARDED
        raise CaptureError(
            f"{what or func} in the loop: this communication is no operation of a program", loc=ob.place(),
            advice=advice or "use all_reduce, all_gather, reduce_scatter, broadcast or all_to_all, or do it outside",
        )  # fmt: skip
    if ob.nested:
        raise CaptureError(
            "a custom autograd.Function communicates", loc=ob.place(),
            advice="use the functions of torch.distributed.nn.functional, which are differentiable, in its place",
        )  # fmt: skip
    with torch._C._AutoDispatchBelowAutograd():
        return handler(ob, given)


_SHARDED = "wrap the model in DistributedDataParallel instead, or gather the parameters (full_tensor()) before the call"
_OBJECTS = "exchange Python objects before the call and pass them as arguments"
_TO_ALL = "use all_gather or all_reduce, which give every process its result"
_ADVICE = {
    "barrier": ("a barrier", "leave it out: it computes nothing, and processes wait for each other at collectives"),
    "monitored_barrier": ("a barrier", "leave it out: processes wait for each other at collectives"),
    "send": ("send", "use broadcast or all_gather"), "recv": ("recv", "use broadcast or all_gather"),
    "recv_any_source": ("recv", "use broadcast or all_gather"),
    "gather": ("gather", _TO_ALL), "reduce": ("reduce", _TO_ALL),
    "scatter": ("scatter", "use broadcast and take the part of this process, or all_to_all"),
}  # fmt: skip


def refuse_sharded(ob: Any, kinds: Sequence[type]) -> None:
    """Refuse tensors that are spread over processes.

    Raises:
        CaptureError: naming the line that uses one.
    """
    if any(k.__name__ in ("DTensor", "ShardedTensor", "LocalTensor") for k in kinds):
        raise CaptureError(
            "a DTensor is used (of fully_shard, or a parameter spread over processes)", loc=ob.place(),
            advice=_SHARDED,
        )  # fmt: skip


# ---- running one


def run_collective(ob: Any, name: str, x: Tensor, *rest: Any, group: Any, called: bool = True) -> Tensor:
    """Run and record ``name(x, *rest, group)``; ``called``: with a roll call before."""
    if x.layout is not torch.strided:
        raise CaptureError(f"{name} of a {x.layout} tensor", loc=ob.place(), advice="use dense tensors")
    if called:
        roll(ob, group, described(name, x, *rest))
    with ob.active():
        return operator(name)(x, *rest, group.group_name)  # type: ignore[no-any-return]


def described(name: str, x: Tensor, *rest: Any) -> str:
    """A collective as a roll call names it."""
    return f"{name}({', '.join([type_text(TensorType.of(x)), *map(str, rest)])})"


def roll(ob: Any, group: Any, what: str) -> None:
    """Compare with the other processes what is about to be done."""
    if ob.roll is None:
        return
    with ob.pause():
        ob.roll.call(group, what, ob.place())


def _write(ob: Any, t: Tensor, name: str, *rest: Any, group: Any, source: Tensor | None = None) -> None:
    """``t = name(source, *rest)`` in place; ``source`` None: of what ``t`` holds."""
    x = t if source is None else source
    if torch.is_grad_enabled() and t.requires_grad and source is None and not t.is_leaf:
        _within_graph(ob, t, name, *rest, group=group)
        return
    with _untracked(x, t):
        y = run_collective(ob, name, x, *rest, group=group)
        with ob.active():
            t.copy_(y.reshape(t.shape))


def _untracked(*tensors: Tensor) -> Any:
    """What PyTorch does not follow is computed as under ``no_grad``."""
    return torch.no_grad() if any(t.requires_grad for t in tensors) else contextlib.nullcontext()


def _within_graph(ob: Any, t: Tensor, name: str, *rest: Any, group: Any) -> None:
    """An in-place collective of a tensor that PyTorch's graph goes through."""
    if not ob.runs:
        raise CaptureError(
            f"an in-place {name} of a tensor that requires grad, in a trace without running", loc=ob.place(),
            advice=f"use torch.distributed.nn.functional.{name}, or trace for real (fake=False)",
        )  # fmt: skip
    ob.will_write(t)
    roll(ob, group, described(name, t, *rest))
    (new,) = ob.emit(operator(name), (ob.read(t, True), *rest, group.group_name), (TensorType.of(ob.twin(t)),))
    with ob.pause(), torch.no_grad():
        t.copy_(operator(name)(t, *rest, group.group_name))
    ob.write(t, new)
    ob.opaque[new] = ob.place()


# ---- one handler per operator


def _work() -> Any:
    from torch._C._distributed_c10d import FakeWork

    return FakeWork().boxed()


def _group(given: dict[str, Any]) -> Any:
    so = given["process_group"]
    return dist.ProcessGroup.unbox(so) if isinstance(so, torch.ScriptObject) else so


def reduction(ob: Any, op: Any) -> str:
    """Name of a reduction, given as PyTorch gives it to an operator or as the user writes it."""
    number = op.op() if isinstance(op, torch.ScriptObject) else getattr(op, "op", op)  # type: ignore[attr-defined]
    for name in REDUCTIONS:
        kind: Any = getattr(dist.ReduceOp, name.upper())
        if number in (kind, kind.value):
            return name
    raise CaptureError(f"a reduction by {op}", loc=ob.place(), advice="use SUM, AVG, MAX, MIN or PRODUCT")


def _all_reduce(ob: Any, given: dict[str, Any]) -> Any:
    op, group = reduction(ob, given["reduce_op"]), _group(given)
    for t in given["tensors"]:
        _write(ob, t, "all_reduce", op, group=group)
    return given["tensors"], _work()


def _all_reduce_many(ob: Any, given: dict[str, Any]) -> Any:
    return _all_reduce(ob, given)[1]


def _all_gather_many(ob: Any, given: dict[str, Any]) -> Any:
    for out, x in zip(given["outputs"], given["inputs"], strict=True):
        _all_gather_whole(ob, {**given, "output_tensor": out, "input_tensor": x})
    return _work()


def _reduce_scatter_many(ob: Any, given: dict[str, Any]) -> Any:
    for out, x in zip(given["outputs"], given["inputs"], strict=True):
        _reduce_scatter_whole(ob, {**given, "output_tensor": out, "input_tensor": x})
    return _work()


def _broadcast(ob: Any, given: dict[str, Any]) -> Any:
    for t in given["tensors"]:
        _write(ob, t, "broadcast", given["root_rank"], group=_group(given))
    return given["tensors"], _work()


def _rows(ob: Any, outs: Sequence[Tensor], y: Tensor) -> None:
    """Parts of a result, one to each tensor."""
    with ob.active():
        for t, row in zip(outs, y.unbind(0), strict=True):
            t.copy_(row)


def _stacked(ob: Any, parts: Sequence[Tensor], what: str) -> Tensor:
    if len({(t.shape, t.dtype) for t in parts}) > 1:
        raise CaptureError(f"{what} of parts of several shapes", loc=ob.place(), advice="pad them to one shape")
    with ob.active():
        return torch.stack(list(parts))


def _all_gather(ob: Any, given: dict[str, Any]) -> Any:
    group = _group(given)
    for outs, x in zip(given["output_tensors"], given["input_tensors"], strict=True):
        if len({t.shape for t in (*outs, x)}) > 1:
            raise CaptureError("all_gather of several shapes", loc=ob.place(), advice="pad them to one shape")
        with _untracked(x, *outs):
            with ob.active():
                one = x.unsqueeze(0)
            _rows(ob, outs, run_collective(ob, "all_gather", one, group.size(), group=group))
    return given["output_tensors"], _work()


def _all_gather_whole(ob: Any, given: dict[str, Any]) -> Any:
    group = _group(given)
    _write(ob, given["output_tensor"], "all_gather", group.size(), group=group, source=given["input_tensor"])
    return given["output_tensor"], _work()


def _reduce_scatter(ob: Any, given: dict[str, Any]) -> Any:
    op, group = reduction(ob, given["reduce_op"]), _group(given)
    for out, parts in zip(given["output_tensors"], given["input_tensors"], strict=True):
        with _untracked(out, *parts):
            x = _stacked(ob, parts, "reduce_scatter")
            _rows(ob, [out], run_collective(ob, "reduce_scatter", x, op, group.size(), group=group))
    return given["output_tensors"], _work()


def _reduce_scatter_whole(ob: Any, given: dict[str, Any]) -> Any:
    group, x = _group(given), given["input_tensor"]
    op = reduction(ob, given["reduce_op"])
    with _untracked(x), ob.active():
        x = x.reshape(group.size(), -1)
    _write(ob, given["output_tensor"], "reduce_scatter", op, group.size(), group=group, source=x)
    return given["output_tensor"], _work()


def _all_to_all(ob: Any, given: dict[str, Any]) -> Any:
    group = _group(given)
    with _untracked(*given["output_tensors"], *given["input_tensors"]):
        x = _stacked(ob, given["input_tensors"], "all_to_all")
        _rows(ob, given["output_tensors"], run_collective(ob, "all_to_all", x, group=group))
    return given["output_tensors"], _work()


def _all_to_all_whole(ob: Any, given: dict[str, Any]) -> Any:
    group, x = _group(given), given["input"]
    splits = {*(given.get("output_split_sizes") or ()), *(given.get("input_split_sizes") or ())}
    if len(splits) > 1 or x.shape[0] % group.size():
        raise CaptureError("all_to_all_single of unequal parts", loc=ob.place(), advice="pad them to one size")
    _write(ob, given["output"], "all_to_all", group=group, source=x)
    return _work()


# ---- functional collectives


def _resolved(ob: Any, given: dict[str, Any]) -> Any:
    name = given["group_name"]
    return group_named(name) if isinstance(name, str) else _group({"process_group": name})


def _result(ob: Any, given: dict[str, Any], name: str, *rest: Any) -> Tensor:
    """A functional collective."""
    x, group = given["input"], _resolved(ob, given)
    if ob.following:
        with torch.enable_grad():
            return run_collective(ob, name, x, *rest, group=group)
    if x.requires_grad and torch.is_grad_enabled():
        raise CaptureError(
            f"a functional {name} of a tensor that requires grad, whose derivative PyTorch does not have",
            loc=ob.place(), advice="use all_reduce, all_gather or reduce_scatter, or detach it",
        )  # fmt: skip
    return run_collective(ob, name, x, *rest, group=group)


def followed(ob: Any, apply: Callable[[], Any]) -> Any:
    """A functional collective that PyTorch's graph goes through: ``apply`` runs it inside a node of autograd."""
    before, ob.following = ob.following, True
    try:
        return apply()
    finally:
        ob.following = before


def _f_all_reduce(ob: Any, given: dict[str, Any]) -> Any:
    return _result(ob, given, "all_reduce", _named_reduction(ob, given["reduce_op"]))


def _f_all_gather(ob: Any, given: dict[str, Any]) -> Any:
    return _result(ob, given, "all_gather", given["group_size"])


def _f_reduce_scatter(ob: Any, given: dict[str, Any]) -> Any:
    op = _named_reduction(ob, given["reduce_op"])
    return _result(ob, given, "reduce_scatter", op, given["group_size"])


def _f_all_to_all(ob: Any, given: dict[str, Any]) -> Any:
    sizes = {*given["output_split_sizes"], *given["input_split_sizes"]}
    if len(sizes) > 1:
        raise CaptureError("all_to_all_single of unequal parts", loc=ob.place(), advice="pad them to one size")
    return _result(ob, given, "all_to_all")


def _f_broadcast(ob: Any, given: dict[str, Any]) -> Any:
    return _result(ob, given, "broadcast", given["src"])


def _named_reduction(ob: Any, name: str) -> str:
    if name not in REDUCTIONS:
        raise CaptureError(f"a reduction by {name!r}", loc=ob.place(), advice="use sum, avg, max, min or product")
    return name


def _given_back(ob: Any, given: dict[str, Any]) -> Any:
    """A result is complete already: nothing to wait for, nothing to wrap."""
    return given.get("tensor", given.get("input", given.get("self")))


_HANDLERS: dict[str, Handler] = {
    "c10d::allreduce_": _all_reduce,
    "c10d::allreduce_coalesced_": _all_reduce_many,
    "c10d::allgather_into_tensor_coalesced_": _all_gather_many,
    "c10d::reduce_scatter_tensor_coalesced_": _reduce_scatter_many,
    "c10d::broadcast_": _broadcast,
    "c10d::allgather_": _all_gather,
    "c10d::_allgather_base_": _all_gather_whole,
    "c10d::reduce_scatter_": _reduce_scatter,
    "c10d::_reduce_scatter_base_": _reduce_scatter_whole,
    "c10d::alltoall_": _all_to_all,
    "c10d::alltoall_base_": _all_to_all_whole,
    "_c10d_functional::all_reduce": _f_all_reduce,
    "_c10d_functional::all_gather_into_tensor": _f_all_gather,
    "_c10d_functional::reduce_scatter_tensor": _f_reduce_scatter,
    "_c10d_functional::broadcast": _f_broadcast,
    "_c10d_functional::all_to_all_single": _f_all_to_all,
    "_c10d_functional::wait_tensor": _given_back,
    "_c10d_functional::_wrap_tensor_autograd": _given_back,
}
