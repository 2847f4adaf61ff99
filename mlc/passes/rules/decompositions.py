"""Operators spelled out in others, where PyTorch's own derivative is missing, wrong or knows one order only.

Every function here has the signature and the results of its operator and is differentiated in its place; the
operator itself is still what runs forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mlc.ir.core import Eqn
from mlc.ir.types import TensorType
from mlc.passes.rules import determinants, losses, norms
from mlc.record import views

__all__ = ["own_decomposition"]

_A: Any = torch.ops.aten
Flags: TypeAlias = "tuple[bool, ...]"


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(v.dim()) if d != dim]
    norm = v.norm(2, dims, keepdim=True) if dims else v.abs()
    return v * (g / norm), norm


def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """All prefixes side by side: O(n^2), but right at every order (PyTorch's takes logarithms)."""
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
    """Boolean masks as positions: as many as values, or any number for a single value."""
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


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """Its own derivative divides infinities where the operands are far apart."""
    out: Tensor = torch.logsumexp(torch.stack(torch.broadcast_tensors(a, b)), 0)
    return out


def _cdist(a: Tensor, b: Tensor, p: float, mode: int | None = None) -> Tensor:
    """All differences at once (fused: no second derivative): memory rows x columns x features."""
    out: Tensor = torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)
    return out


def _pdist(x: Tensor, p: float = 2) -> Tensor:
    i, j = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device).unbind(0)
    out: Tensor = torch.linalg.vector_norm(x.index_select(0, i) - x.index_select(0, j), p, -1)
    return out


def _embedding_bag(
    op: Any, weight: Tensor, indices: Tensor, offsets: Tensor, scale: bool = False, mode: int = 0,
    sparse: bool = False, per_sample: Tensor | None = None, last: bool = False, padding: int = -1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Rows gathered, then added up by bag; the fused operator has no second derivative."""
    if scale or (mode == 2 and padding >= 0):
        raise NotImplementedError("embedding_bag with scale_grad_by_freq, or the largest beside padding")
    each = None if per_sample is None else per_sample.detach()
    fused = op(weight.detach(), indices, offsets, scale, mode, sparse, each, last, padding)
    rest = fused[1:]
    starts = offsets[:-1] if last else offsets
    place = torch.arange(indices.shape[0], device=indices.device)
    bag = (place.unsqueeze(1) >= starts.unsqueeze(0)).sum(1) - 1
    count = torch.zeros(starts.shape[0], dtype=weight.dtype, device=weight.device)
    if mode == 2:
        full = count.index_add(0, bag, torch.ones_like(bag, dtype=weight.dtype)).gt(0).unsqueeze(1)
        return (
            torch.where(full, weight.gather(0, rest[2]), torch.zeros_like(rest[2], dtype=weight.dtype)),
            *rest,
        )
    used = indices.ne(padding).to(weight.dtype)
    rows = weight.index_select(0, indices) * used.unsqueeze(1)
    if per_sample is not None:
        rows = rows * per_sample.unsqueeze(1)
    out = torch.zeros(starts.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
    out = out.index_add(0, bag, rows)
    if mode == 1:
        out = out / count.index_add(0, bag, used).clamp(min=1).unsqueeze(1)
    return (out, *rest)


def _embedding_renorm(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Rows that are looked up and longer than ``max_norm`` are shortened to it; the others stay."""
    norms = torch.linalg.vector_norm(weight, norm_type, 1, keepdim=True)
    hit = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    hit = hit.index_fill(0, indices.reshape(-1), True).unsqueeze(1)
    return torch.where(hit & (norms > max_norm), weight * (max_norm / (norms + 1e-7)), weight)


_SPELT: dict[Any, Callable[..., Any]] = {
    _A._weight_norm_interface.default: _weight_norm,
    _A.logcumsumexp.default: _logcumsumexp,
    _A.logaddexp.default: _logaddexp,
    _A.index_fill.int_Tensor: _index_fill,
    _A.as_strided_scatter.default: _as_strided_scatter,
    _A._cdist_forward.default: _cdist,
    _A._pdist_forward.default: _pdist,
    _A._embedding_bag.default: partial(_embedding_bag, _A._embedding_bag.default),
    _A._embedding_bag_forward_only.default: partial(_embedding_bag, _A._embedding_bag_forward_only.default),
    _A._linalg_det.default: determinants.det,
    _A.embedding_renorm.default: _embedding_renorm,
    _A._ctc_loss_backward.default: losses.ctc_backward,
    _A._ctc_loss_backward.Tensor: losses.ctc_backward,
    _A.multi_margin_loss_backward.default: losses.multi_margin_backward,
    _A.multilabel_margin_loss_backward.default: losses.multilabel_margin_backward,
}


def own_decomposition(e: Eqn, active: Flags, given: tuple[Any, ...] = ()) -> Callable[..., Any] | None:
    """Our own spelling of an equation's operator, where its formulas cannot be used.

    Args:
        e: The equation.
        active: Which of its inputs are differentiated.
        given: Its results' cotangents (None for one without); empty for a forward rule.
    """
    op, args = e.op, e.args
    if op in (_A.index_put.default, _A._unsafe_index_put.default):
        return _index_put if any(_is_mask(i) for i in args[1]) else None
    if op is _A.native_layer_norm_backward.default:
        return norms.layer_norm_backward if args[5] is None else None
    if op in (_A._ctc_loss.default, _A._ctc_loss.Tensor):
        shapes = [v.type.shape for v in e.outs if isinstance(v.type, TensorType)]
        return losses.ctc(shapes) if given else None
    spelled = _NORMS.get(op)
    if spelled is None:
        return _SPELT.get(op)
    if not given:
        return spelled if _reads_running(e, active) else norms.with_statistics(op, spelled)
    return spelled if any(g is not None for g in given[1:]) or _reads_running(e, active) else None


_NORMS: dict[Any, Callable[..., Any]] = {
    _A.native_layer_norm.default: norms.layer_norm,
    _A.native_batch_norm.default: norms.batch_norm,
}


def _reads_running(e: Eqn, active: Flags) -> bool:
    """Whether a normalisation in evaluation is differentiated in its running statistics."""
    if e.op is not _A.native_batch_norm.default or e.args[5]:
        return False
    running = {v for v in e.args[3:5] if v is not None}
    return any(a and v in running for v, a in zip(e.inputs, active, strict=True))


def _is_mask(index: Any) -> bool:
    return index is not None and index.type.dtype in (torch.bool, torch.uint8)
