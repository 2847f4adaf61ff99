"""Writing through views: for each view operator, how a new value of the view becomes a new value of its base.

Every rule is an ordinary differentiable function, so a gradient through an in-place write on a view is the
gradient of the functional form (``select_scatter`` and relatives), never of ``as_strided_scatter``, whose
PyTorch derivative is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlc.ir.core import aten

__all__ = ["IDENTITY_VIEWS", "PHYSICAL", "write_through"]

_A: Any = torch.ops.aten
IDENTITY_VIEWS = {aten("detach"), aten("alias"), aten("lift_fresh")}
# Views that are a pending operation (the conjugate and negative bit): values of programs have it carried out.
PHYSICAL = {_A._conj.default: _A._conj_physical.default, _A._neg_view.default: _A.neg.default}


def _reshape(new: Tensor, base: Tensor, *_: object) -> Tensor:
    return new.reshape(base.shape)


def _permute(new: Tensor, base: Tensor, dims: list[int]) -> Tensor:
    inverse = [0] * len(dims)
    for i, d in enumerate(dims):
        inverse[d % len(dims)] = i
    return new.permute(inverse)


def _select(new: Tensor, base: Tensor, dim: int, index: int) -> Tensor:
    return torch.select_scatter(base, new, dim, index)


def _slice(new: Tensor, base: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1,
           ) -> Tensor:  # fmt: skip
    return torch.slice_scatter(base, new, dim, start, end, step)


def _diagonal(new: Tensor, base: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    return torch.diagonal_scatter(base, new, offset, dim1, dim2)


def _storage_order(base: Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest."""
    return sorted(range(base.dim()), key=lambda d: (-base.stride()[d], d))


def _dense(base: Tensor) -> bool:
    """Whether the tensor fills its memory, each place once."""
    n = 1
    for d in reversed(_storage_order(base)):
        if base.shape[d] != 1:
            if base.stride(d) != n:
                return False
            n *= base.shape[d]
    return True


def _as_strided(new: Tensor, base: Tensor, size: list[int], stride: list[int], offset: int | None = None) -> Tensor:
    """Each element of the view by its place in memory; ``base`` must fill its memory without gaps."""
    order = _storage_order(base)
    flat = base.permute(order).reshape(-1)
    where = torch.full((), offset or 0, dtype=torch.int64, device=base.device)
    for n, s in zip(size, stride, strict=True):
        where = where.unsqueeze(-1) + torch.arange(n, device=base.device) * s
    flat = flat.index_put((where.reshape(-1),), new.reshape(-1))
    inverse = [order.index(d) for d in range(base.dim())]
    return flat.reshape([base.shape[d] for d in order]).permute(inverse)


_RULES: dict[Any, Callable[..., Tensor]] = {
    _A.view.default: _reshape,
    _A._unsafe_view.default: _reshape,
    _A._reshape_alias.default: _reshape,
    _A.squeeze.default: _reshape,
    _A.squeeze.dim: _reshape,
    _A.squeeze.dims: _reshape,
    _A.unsqueeze.default: _reshape,
    _A.t.default: lambda new, base: new.t(),
    _A.transpose.int: lambda new, base, a, b: new.transpose(a, b),
    _A.permute.default: _permute,
    _A.select.int: _select,
    _A.slice.Tensor: _slice,
    _A.diagonal.default: _diagonal,
    _A.as_strided.default: _as_strided,
    _A._neg_view.default: lambda new, base: -new,
    _A.view_as_real.default: lambda new, base: torch.view_as_complex(new.contiguous()),
    _A.view_as_complex.default: lambda new, base: torch.view_as_real(new),
    _A._conj.default: lambda new, base: new.conj(),
}


def _unbind(new: Tensor, base: Tensor, index: int, dim: int = 0) -> Tensor:
    return torch.select_scatter(base, new, dim, index)


def _split(new: Tensor, base: Tensor, index: int, size: int | list[int], dim: int = 0) -> Tensor:
    start = index * size if isinstance(size, int) else sum(size[:index])
    return torch.slice_scatter(base, new, dim, start, start + new.shape[dim])


_MANY: dict[Any, Callable[..., Tensor]] = {
    _A.unbind.int: _unbind,
    _A.split.Tensor: _split,
    _A.split_with_sizes.default: _split,
}


def write_through(op: object, args: tuple[Any, ...], base: Tensor, new: Tensor, index: int = 0) -> Tensor | None:
    """New value of ``base`` after result ``index`` of ``op(base, *args)`` became ``new``; None without a rule."""
    if op in _MANY:
        return _MANY[op](new, base, index, *args)
    rule = _RULES.get(op)
    if op is _A.as_strided.default and not _dense(base):
        return None
    return None if rule is None else rule(new, base, *args)
