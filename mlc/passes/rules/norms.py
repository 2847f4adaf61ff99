"""Normalisations in elementary operators, and their statistics as the functions of the input that they are.

PyTorch differentiates layer and batch norm by formulas that read the saved mean and reciprocal deviation.  The first
two derivatives are right: the formula for the input accounts for what the input does to the statistics.  The second
derivative, however, consists of elementary operators that read the statistics, and there autograd takes them for
constants, so that a third derivative (a gradient penalty inside an inner loss) is silently wrong.  Here statistics
carry a derivative (:data:`mlc.passes.rules.legality.STATISTICS`); whatever reads them gives a cotangent, and the
operators below say what it means for the input.  Up to second order nothing reads them so, and the fused operators
remain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["batch_norm", "layer_norm", "layer_norm_backward", "with_statistics"]

_A: Any = torch.ops.aten


def _centered(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean, mean, variance) over ``dims``."""
    mean = x.mean(dims, keepdim=True)
    centered = x - mean
    return centered, mean, (centered * centered).mean(dims, keepdim=True)


def layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_layer_norm`` with all three results differentiable."""
    centered, mean, var = _centered(x, list(range(x.dim() - len(shape), x.dim())))
    rstd = torch.rsqrt(var + eps)
    y = centered * rstd
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias), mean, rstd


def layer_norm_backward(
    g: Tensor, x: Tensor, shape: list[int], mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, mask: list[bool],
) -> Any:  # fmt: skip
    """With a weight of ones: PyTorch's second derivative needs a weight to know mean(x) and rstd(x)."""
    ones = torch.ones(shape, dtype=x.dtype, device=x.device)
    return _A.native_layer_norm_backward.default(g, x, shape, mean, rstd, ones, bias, mask)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``native_batch_norm``; in evaluation also differentiable in the running statistics."""
    wide = [1, -1] + [1] * (x.dim() - 2)
    if training:
        centered, mean, var = _centered(x, [d for d in range(x.dim()) if d != 1])
        rstd = torch.rsqrt(var + eps)
        saved = mean.reshape(-1), rstd.reshape(-1)
    else:
        assert running_mean is not None and running_var is not None
        centered = x - running_mean.reshape(wide).to(x.dtype)
        rstd = torch.rsqrt(running_var + eps).reshape(wide).to(x.dtype)
        saved = x.new_zeros(0), x.new_zeros(0)
    y = centered * rstd
    if weight is not None:
        y = y * weight.reshape(wide)
    return (y if bias is None else y + bias.reshape(wide)), *saved


def with_statistics(op: Any, spelled: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's own results, its statistics with the tangents of the spelling (for the forward rule)."""

    def both(*args: Any, **kwargs: Any) -> Any:
        y, *saved = op(*args, **kwargs)
        tangents = [forward_ad.unpack_dual(t).tangent for t in spelled(*args, **kwargs)[1:]]
        return y, *[
            s if t is None or t.shape != s.shape else forward_ad.make_dual(s, t.to(s.dtype))
            for s, t in zip(saved, tangents, strict=True)
        ]

    return both
