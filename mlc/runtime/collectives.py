"""What collectives of programs do when they run: ``torch.distributed``, on whatever backend a group has.

Each call returns when its result may be read (on a GPU: by the current stream).  A mean is a sum divided by the number
of processes on every backend, as ``DistributedDataParallel`` takes it.  Operands need not be contiguous; results are
laid out as the operators say (:mod:`mlc.ir.communication.collectives`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlc.errors import CommunicationError
from mlc.ir.communication.collectives import LIBRARY
from mlc.runtime.circle import ended

__all__ = ["REDUCTIONS", "group_named", "group_ranks"]

REDUCTIONS = ("sum", "avg", "max", "min", "product")


def group_named(name: str) -> Any:
    """The process group that PyTorch knows by this name.

    Raises:
        CommunicationError: where there is none.
    """
    module: Any = dist.distributed_c10d
    try:
        return module._resolve_process_group(name)
    except (RuntimeError, ValueError, KeyError) as e:
        raise CommunicationError(
            f"there is no process group {name!r} any more", advice="call torch.distributed.init_process_group first"
        ) from e


def group_ranks(name: str) -> list[int]:
    """Ranks in the world of the processes of a group."""
    return list(dist.get_process_group_ranks(group_named(name)))


def _op(name: str) -> Any:
    return dist.ReduceOp.SUM if name == "avg" else getattr(dist.ReduceOp, name.upper())


def _all_reduce(x: Tensor, op: str, group: str) -> Tensor:
    g = group_named(group)
    y = x.clone()
    flat = _dense(y)
    dist.all_reduce(flat, op=_op(op), group=g)
    if flat is not y:
        y.copy_(flat)
    return y.div_(g.size()) if op == "avg" else y


def _dense(y: Tensor) -> Tensor:
    """A tensor that backends take: contiguous, in the order in which it lies in memory."""
    if y.is_contiguous():
        return y
    strides = y.stride()
    moved = y.permute(sorted(range(y.dim()), key=lambda d: (-strides[d], d)))
    return moved if moved.is_contiguous() else y.contiguous()


def _all_gather(x: Tensor, size: int, group: str) -> Tensor:
    g = group_named(group)
    x = x.reshape(1) if x.dim() == 0 else x.contiguous()
    out = x.new_empty((size * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x, group=g)
    return out


def _reduce_scatter(x: Tensor, op: str, size: int, group: str) -> Tensor:
    g = group_named(group)
    out = x.new_empty((x.shape[0] // size, *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), op=_op(op), group=g)
    return out.div_(size) if op == "avg" else out


def _broadcast(x: Tensor, source: int, group: str) -> Tensor:
    g = group_named(group)
    y = x.clone()
    flat = _dense(y)
    dist.broadcast(flat, group=g, group_src=source)
    if flat is not y:
        y.copy_(flat)
    return y


def _reduce(x: Tensor, target: int, group: str) -> Tensor:
    g = group_named(group)
    y = x.clone()
    flat = _dense(y)
    dist.reduce(flat, group=g, group_dst=target)
    if g.rank() != target:
        return y.zero_()
    if flat is not y:
        y.copy_(flat)
    return y


def _all_to_all(x: Tensor, group: str) -> Tensor:
    g = group_named(group)
    out = x.new_empty(x.shape)
    dist.all_to_all_single(out, x.contiguous(), group=g)
    return out


def _saying(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Failures of the backend (a process that died or did not come in time) as errors of ours."""

    def call(*args: Any) -> Tensor:
        try:
            return run(*args)
        except (RuntimeError, ValueError) as e:
            if isinstance(e, torch.OutOfMemoryError):
                raise
            group = args[-1]
            raise CommunicationError(
                f"{name} in process group {group!r} failed on rank {dist.get_rank()}{ended(group_ranks(group))}: "
                f"{str(e).strip().splitlines()[0]}",
                advice="look at the other processes' first errors: one of them has died, or did not come in time",
            ) from e

    return call


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter, "broadcast": _broadcast,
    "reduce": _reduce, "all_to_all": _all_to_all,
}  # fmt: skip

for _name, _kernel in _KERNELS.items():
    LIBRARY.impl(_name, _saying(_name, _kernel), "CompositeExplicitAutograd")
