"""The determinant with a derivative of every order, at singular matrices too.

d det(A) = tr(adj(A) dA), and the adjugate is a polynomial in A.  Where A is regular it is det(A) inv(A); near singular
ones it comes from the recursion of Faddeev and LeVerrier (n - 1 matrix products; to 16 rows, where rounding does not
matter), in larger matrices from singular values.  PyTorch chooses between two formulas by data and, where it cannot
look, computes both: the one that is not meant is 0 / 0 in its own derivatives, which makes third derivatives NaN.
Here each formula is given a matrix that it is fit for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["adjugate", "det"]

_A: Any = torch.ops.aten
_SMALL = 16


class _Det(torch.autograd.Function):
    """The operator with the derivative above; the factorisation is not differentiable."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Any:
        out = _A._linalg_det.default(a)
        ctx.mark_non_differentiable(*out[1:])
        ctx.save_for_backward(a, out[0])
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        a, value = ctx.saved_tensors
        return g[..., None, None] * adjugate(a, value).mH


def det(a: Tensor) -> Any:
    """``aten._linalg_det``."""
    return _Det.apply(a)  # type: ignore[no-untyped-call]


def adjugate(a: Tensor, value: Tensor) -> Tensor:
    """Adjugate of (batches of) square matrices ``[..., n, n]`` with determinants ``value``."""
    n = a.shape[-1]
    if n < 2:
        return torch.ones_like(a)
    small = n <= _SMALL
    eps = torch.finfo(a.dtype).eps
    bound = torch.linalg.vector_norm(a.detach(), dim=-1).prod(-1)  # Hadamard's: |det| is at most that
    singular = (value.detach().abs() <= bound * (eps**0.5 if small else n * eps))[..., None, None]
    one = torch.eye(n, dtype=a.dtype, device=a.device)
    regular = torch.linalg.inv_ex(torch.where(singular, one, a))[0] * value[..., None, None]
    if small:
        return torch.where(singular, _recursion(a, one), regular)
    spread = torch.arange(1, n + 1, device=a.device).to(a.dtype).diag()
    return torch.where(singular, _by_singular_values(torch.where(singular, a, spread)), regular)


def _recursion(a: Tensor, one: Tensor) -> Tensor:
    """(-1)^(n-1) M_n with M_1 = 1 and M_(k+1) = A M_k - tr(A M_k) / k."""
    n = a.shape[-1]
    m = one.expand(a.shape)
    for k in range(1, n):
        product = a @ m
        trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        m = product - trace / k * one
    return m if n % 2 else -m


def _by_singular_values(a: Tensor) -> Tensor:
    """det(U) det(Vh) V (products of all singular values but one) Uh."""
    u, s, vh = torch.linalg.svd(a)
    others = s.unsqueeze(-2).expand(*s.shape, s.shape[-1])
    mask = torch.eye(s.shape[-1], dtype=torch.bool, device=a.device)
    rest = torch.where(mask, torch.ones((), dtype=s.dtype, device=a.device), others).prod(-1)
    sign = (torch.linalg.det(u) * torch.linalg.det(vh))[..., None, None]
    found: Tensor = sign * (vh.mH * rest.unsqueeze(-2)) @ u.mH
    return found
