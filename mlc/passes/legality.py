"""Which of PyTorch's derivative formulas may be used.

"A formula exists" is not legality: a sweep over PyTorch's operator database against float64 differences
(``tests/opinfo``, results in ``docs/legality.md``) finds operators whose forward formula raises or is silently wrong.
The entries here say which, and the rules of :mod:`mlc.passes.rules` then go another exact way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlc.ir import views

__all__ = [
    "DECOMPOSITIONS",
    "REVERSE_NEEDS_DECOMPOSITION",
    "SECOND_ORDER_FORMULA",
    "own_decomposition",
    "forward_formula_trusted",
]

_A: Any = torch.ops.aten

# Forward formula silently wrong (torch 2.11 - 2.13): transpose the reverse rule instead.
_FORWARD_WRONG = {
    _A.cholesky_inverse.default,
    _A.logcumsumexp.default,
    _A.triangular_solve.default,
    # equal indices: the forward formula keeps the last write, the reverse formula hands each write its cotangent
    _A.max_unpool2d.default,
    _A.max_unpool3d.default,
}

# PyTorch has two reverse formulas and takes this one under create_graph: the other reads factors (LU, pivots) that are
# not differentiable results, so that its own derivative is silently wrong.
SECOND_ORDER_FORMULA = {
    _A._linalg_det.default,
    _A._linalg_slogdet.default,
    _A._linalg_solve_ex.default,
    _A.cumprod.default,
}

# Reverse formula of a fused operator has no (or a wrong) second derivative: differentiate its decomposition.
REVERSE_NEEDS_DECOMPOSITION: set[Any] = set()


def forward_formula_trusted(op: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> bool:
    """Whether PyTorch's forward-mode formula of ``op`` with these arguments is right."""
    if op in _FORWARD_WRONG:
        return False
    return not (op is _A.scatter_reduce.two and "prod" in args)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(v.dim()) if d != dim]
    norm = v.norm(2, dims, keepdim=True) if dims else v.abs()
    return v * (g / norm), norm


def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """All prefixes side by side: O(n^2), but right at every order (PyTorch's formula takes logarithms of signs)."""
    if x.dim() == 0:
        return x.clone()
    last = x.movedim(dim, -1)
    n = last.shape[-1]
    prefix = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
    rows = torch.where(prefix, last.unsqueeze(-2), torch.full((), -torch.inf, dtype=x.dtype, device=x.device))
    return torch.logsumexp(rows, -1).movedim(-1, dim)


def _index_fill(x: Tensor, dim: int, index: Tensor, value: Tensor) -> Tensor:
    if x.dim() == 0:
        return value.to(x.dtype).expand(x.shape).clone()
    hit = torch.zeros(x.shape[dim], dtype=torch.bool, device=x.device).index_fill(0, index.reshape(-1), True)
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.where(hit.reshape(shape), value.to(x.dtype), x)


def _index_put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """Boolean masks as positions: their number is the number of values, or does not matter for a single one."""
    masks = [i for i, t in enumerate(indices) if t is not None and t.dtype in (torch.bool, torch.uint8)]
    if len(masks) != 1 or any(t is not None for i, t in enumerate(indices) if i not in masks):
        raise NotImplementedError("boolean masks beside other indices")
    at = masks[0]
    mask = indices[at]
    assert mask is not None
    tail = x.dim() - at - mask.dim()
    if values.dim() <= tail or values.shape[values.dim() - tail - 1] == 1:
        if values.dim() > tail:
            values = values.squeeze(values.dim() - tail - 1)
        shape = [1] * (x.dim() - tail - mask.dim()) + list(mask.shape) + [1] * tail
        lead = values.shape[: values.dim() - tail]
        values = values.reshape([*lead, *[1] * mask.dim(), *values.shape[values.dim() - tail :]])
        return torch.where(mask.bool().reshape(shape), x + values if accumulate else values, x)
    n = values.shape[values.dim() - tail - 1]
    places = torch.ops.aten.nonzero_static(mask, size=n, fill_value=0).unbind(1)
    return torch.index_put(x, [*indices[:at], *places], values, accumulate)


def _as_strided_scatter(
    x: Tensor, src: Tensor, size: list[int], stride: list[int], offset: int | None = None
) -> Tensor:
    new = views.write_through(_A.as_strided.default, (size, stride, offset), x, src)
    if new is None:
        raise NotImplementedError("as_strided_scatter on a tensor whose memory has gaps")
    return new


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(dims, keepdim=True)
    centered = x - mean
    rstd = torch.rsqrt((centered * centered).mean(dims, keepdim=True) + eps)
    y = centered * rstd
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias), mean, rstd


def _layer_norm_backward(
    g: Tensor, x: Tensor, shape: list[int], mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    mask: list[bool],
) -> Any:  # fmt: skip
    """With a weight of ones: PyTorch's second derivative knows mean and rstd as functions of x, but needs a weight."""
    ones = torch.ones(shape, dtype=x.dtype, device=x.device)
    return _A.native_layer_norm_backward.default(g, x, shape, mean, rstd, ones, bias, mask)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _A._weight_norm_interface.default: _weight_norm,
    _A.logcumsumexp.default: _logcumsumexp,
    _A.index_fill.int_Tensor: _index_fill,
    _A.as_strided_scatter.default: _as_strided_scatter,
}


def own_decomposition(
    op: Any, args: tuple[Any, ...], given: tuple[Any, ...] = ()
) -> Callable[..., Any] | None:
    """Our own spelling of an operator whose formulas cannot be used with these arguments and cotangents."""
    if op in (_A.index_put.default, _A._unsafe_index_put.default):
        return _index_put if any(_is_mask(i) for i in args[1]) else None
    if op is _A.native_layer_norm.default and any(g is not None for g in given[1:]):
        return _layer_norm  # PyTorch's formula ignores cotangents of the statistics
    if op is _A.native_layer_norm_backward.default:
        return _layer_norm_backward if args[5] is None else None
    return DECOMPOSITIONS.get(op)


def _is_mask(index: Any) -> bool:
    return index is not None and index.type.dtype in (torch.bool, torch.uint8)
