"""Losses whose gradient is a fused operator without a derivative of its own.

Their first derivative stays fused; what is spelled out here is that gradient as a function, as the gradient of the loss
in elementary operators, so that an inner step can be differentiated.  The connectionist temporal classification is the
recursion over prefixes of Graves et al. (2006), one ``logaddexp`` over the alignments per frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["ctc", "ctc_backward", "multi_margin_backward", "multilabel_margin_backward"]

_FAR = -1e30  # log of a probability that is zero; infinities would make derivatives of 0 - 0


def _gradient(loss: Callable[[Tensor], Tensor], g: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``loss`` at ``x``, itself differentiable in both."""
    with torch.enable_grad():
        at = x
        if not x.requires_grad:
            value, tangent = forward_ad.unpack_dual(x)
            at = value.detach().requires_grad_()
            if tangent is not None:  # detach() forgets it
                at = forward_ad.make_dual(at, tangent)
        (out,) = torch.autograd.grad(loss(at), at, g, create_graph=True)
    return out


def _reduced(each: Tensor, reduction: int) -> Tensor:
    return each if reduction == 0 else each.mean() if reduction == 1 else each.sum()


def multi_margin_backward(
    g: Tensor, x: Tensor, target: Tensor, p: float, margin: float, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    """``multi_margin_loss_backward``."""

    def loss(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        at = target.reshape(-1, 1)
        gap = (margin - rows.gather(1, at) + rows).clamp(min=0)
        gap = gap.masked_fill(torch.zeros_like(rows, dtype=torch.bool).scatter(1, at, True), 0)
        each = (gap if p == 1 else gap * gap).mean(1)
        if weight is not None:
            each = each * weight.index_select(0, at.reshape(-1))
        return _reduced(each.reshape(target.shape), reduction)

    return _gradient(loss, g, x)


def multilabel_margin_backward(g: Tensor, x: Tensor, target: Tensor, reduction: int, is_target: Tensor) -> Tensor:
    """``multilabel_margin_loss_backward``; labels of a row end at the first -1."""

    def loss(x: Tensor) -> Tensor:
        rows, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1, x.shape[-1])
        used = labels.ge(0).cumprod(1).bool()
        others = is_target.reshape(rows.shape).eq(0)
        gap = (1 - rows.gather(1, labels.clamp(min=0)).unsqueeze(2) + rows.unsqueeze(1)).clamp(min=0)
        gap = gap.masked_fill(~(used.unsqueeze(2) & others.unsqueeze(1)), 0)
        return _reduced((gap.sum((1, 2)) / x.shape[-1]).reshape(target.shape[:-1]), reduction)

    return _gradient(loss, g, x)


class _Ctc(torch.autograd.Function):
    """The fused loss for recording its gradient: the size of what it saves cannot be told from fake tensors."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, rest: tuple[Any, ...], shapes: Sequence[tuple[int, ...]]) -> Any:
        ctx.save_for_backward(logp)
        ctx.rest, ctx.outs = rest, tuple([logp.new_zeros(s) for s in shapes])
        ctx.mark_non_differentiable(ctx.outs[1])
        return ctx.outs

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        (logp,) = ctx.saved_tensors
        targets, frames, lengths, blank, zero_infinity = ctx.rest
        overload = "Tensor" if isinstance(frames, Tensor) else "default"
        fused = getattr(torch.ops.aten._ctc_loss_backward, overload)
        return fused(g, logp, targets, frames, lengths, *ctx.outs, blank, zero_infinity), None, None


def ctc(shapes: Sequence[tuple[int, ...]]) -> Callable[..., Any]:
    """``_ctc_loss`` with results of known shapes."""

    def loss(
        logp: Tensor, targets: Tensor, frames: Any, lengths: Any, blank: int = 0, zero_infinity: bool = False
    ) -> Any:
        return _Ctc.apply(logp, (targets, frames, lengths, blank, zero_infinity), shapes)  # type: ignore[no-untyped-call]

    return loss


def ctc_backward(
    g: Tensor, logp: Tensor, targets: Tensor, frames: Any, lengths: Any, nll: Tensor, alpha: Tensor, blank: int,
    zero_infinity: bool = False,
) -> Tensor:  # fmt: skip
    """``_ctc_loss_backward``: what it adds for probabilities that are normalised is added here too."""
    frames_, lengths_ = _numbers(frames, logp), _numbers(lengths, logp)
    labels = _padded(targets, lengths, lengths_, logp)
    finite = torch.isfinite(nll.detach()) if zero_infinity else torch.ones_like(nll, dtype=torch.bool)
    g = torch.where(finite, g, torch.zeros_like(g))
    out = _gradient(lambda x: _ctc(x, labels, frames_, lengths_, blank), g, logp)
    inside = torch.arange(logp.shape[0], device=logp.device).unsqueeze(1) < frames_.unsqueeze(0)
    return torch.where(inside.unsqueeze(2), out + g.unsqueeze(1) * logp.exp(), torch.zeros_like(out))


def _numbers(a: Sequence[int] | Tensor, like: Tensor) -> Tensor:
    if isinstance(a, Tensor):
        return a.to(like.device, torch.int64)
    return torch.stack([torch.full((), n, dtype=torch.int64, device=like.device) for n in a])


def _padded(targets: Tensor, lengths: Any, lengths_: Tensor, logp: Tensor) -> Tensor:
    """Labels ``[batch, most]``; they may come one example behind the other."""
    if targets.dim() == 2:
        return targets.to(torch.int64)
    most = targets.shape[0] if isinstance(lengths, Tensor) else max(lengths, default=0)
    at = (lengths_.cumsum(0) - lengths_).unsqueeze(1) + torch.arange(most, device=logp.device).unsqueeze(0)
    flat = targets.to(torch.int64)
    return flat[at.clamp(max=max(targets.shape[0] - 1, 0))] if targets.shape[0] else flat.new_zeros(at.shape)


def _ctc(logp: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """Negative log likelihoods ``[batch]`` of ``logp[time, batch, class]``."""
    steps, batch, _ = logp.shape
    width = 2 * labels.shape[1] + 1
    path = torch.full((batch, width), blank, dtype=torch.int64, device=logp.device)
    path[:, 1::2] = labels
    place = torch.arange(width, device=logp.device)
    skips = (place % 2 == 1) & (place > 1) & (path != path.roll(2, 1))
    far = torch.full((), _FAR, dtype=logp.dtype, device=logp.device)
    score = logp.gather(2, path.unsqueeze(0).expand(steps, -1, -1))
    a = torch.where(place.unsqueeze(0) < 2, score[0], far)
    for t in range(1, steps):
        before = torch.where(place < 1, far, a.roll(1, 1))
        leap = torch.where(skips, a.roll(2, 1), far)
        new = score[t] + torch.logsumexp(torch.stack([a, before, leap]), 0)
        a = torch.where((frames > t).unsqueeze(1), new, a)
    last = (2 * lengths).unsqueeze(1)
    before = torch.where(last > 0, a.gather(1, (last - 1).clamp(min=0)), far)
    return -torch.logsumexp(torch.stack([a.gather(1, last), before]), 0).squeeze(1)  # logaddexp: NaN at second order
