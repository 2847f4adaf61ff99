"""The roots' autograd nodes, differentiable as often as one likes.

For F(x, a) = 0 the implicit function theorem gives ``x_bar^T dx/da = -u^T dF/da`` with ``(dF/dx)^T u = x_bar``.  The
solution u is a node of its own: ``A(x, a) u = v`` solved for u has ``v_bar = z`` with ``A^T z = u_bar``, and the
cotangents ``-d/d(x, a) <z, A(x, a) u>``.  Both rules are written in terms of each other, so second and higher
derivatives are the same rules again (Blondel et al. 2022, "Efficient and modular implicit differentiation", for the
first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlc.implicit.condition import Condition, Linear, Tensors, grads, stand_ins
from mlc.implicit.log import Log
from mlc.implicit.residual import check_distance
from mlc.implicit.system import Settings, solve_system
from mlc.linear.solve import Packing

__all__ = ["Spec", "pull", "rooted", "solution"]


@dataclass
class Spec:
    """One root: its condition, how its systems are solved, and what the last solve did.

    Attributes:
        condition: F.
        settings: Of the linear solver.
        n_x: How many tensors x has.
        log: Keeps the last linear solve.
    """

    condition: Condition
    settings: Settings
    n_x: int
    log: Log = field(default_factory=Log)


def rooted(spec: Spec, x: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensors:
    """``x`` as the root of the condition, connected to ``inputs``."""
    apply: Any = _Root.apply
    out = apply(spec, *x, *inputs)
    return out if isinstance(out, tuple) else (out,)


def solution(spec: Spec, transposed: bool, x: Sequence[Tensor], inputs: Sequence[Tensor], v: Sequence[Tensor]
             ) -> Tensors:  # fmt: skip
    """The u with ``(dF/dx)^T u = v`` (``transposed``) or ``(dF/dx) u = v``; differentiable."""
    apply: Any = _Solution.apply
    u = apply(spec, transposed, *x, *inputs, *v)
    return u if isinstance(u, tuple) else (u,)


def pull(spec: Spec, x: Sequence[Tensor], inputs: Sequence[Tensor], cts: Sequence[Tensor], wanted: Sequence[bool]
         ) -> list[Tensor | None]:  # fmt: skip
    """Cotangents of ``inputs`` given those of ``x``; differentiable where gradients are enabled."""
    again = torch.is_grad_enabled()
    condition = spec.condition
    condition.unchanged()
    u = solution(spec, True, x, inputs, cts)
    with torch.enable_grad():
        given = stand_ins(inputs, wanted, again)
        values = condition.evaluate(stand_ins(x, [True] * len(x), again), given)
        if not again:
            with torch.no_grad():
                scale = check_distance(spec, x, u, cts, values)
        found = grads(values, given, u, create=again)
    if not again:
        scale(found, given)
    return [-g if w else None for g, w in zip(found, wanted, strict=True)]


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor) -> Any:
        x = tuple(t.detach().clone() for t in tensors[: spec.n_x])
        ctx.spec = spec
        ctx.save_for_backward(*x, *tensors[spec.n_x :])
        return x

    @staticmethod
    def backward(ctx: Any, *cts: Any) -> Any:
        spec = ctx.spec
        n = spec.n_x
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1 + n :]
        return (None, *[None] * n, *pull(spec, saved[:n], saved[n:], cts, wanted))


class _Solution(torch.autograd.Function):
    """``(dF/dx)^T u = v`` (transposed) or ``(dF/dx) u = v``, solved for u."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, transposed: bool, *tensors: Tensor) -> Any:
        n = spec.n_x
        x, inputs, v = tensors[:n], tensors[n : len(tensors) - n], tensors[len(tensors) - n :]
        packing = Packing.of(v)
        linear = Linear.of(spec.condition, x, inputs)
        found = solve_system(
            spec.settings, linear, packing.flat(v).detach(), transposed=transposed, what=spec.condition.what
        )
        spec.log.last = found
        u = tuple(p.clone() for p in packing.parts(found.x))
        ctx.spec, ctx.transposed = spec, transposed
        ctx.save_for_backward(*x, *inputs, *u)
        return u

    @staticmethod
    def backward(ctx: Any, *cts: Any) -> Any:
        spec, n = ctx.spec, ctx.spec.n_x
        saved = ctx.saved_tensors
        x, inputs, u = saved[:n], saved[n : len(saved) - n], saved[len(saved) - n :]
        z = solution(spec, not ctx.transposed, x, inputs, cts)
        again = torch.is_grad_enabled()
        wanted = ctx.needs_input_grad[2 : 2 + len(x) + len(inputs)]
        with torch.enable_grad():
            given = stand_ins([*x, *inputs], [True] * n + list(wanted[n:]), again)
            values = spec.condition.evaluate(given[:n], given[n:])
            left, right = (u, z) if ctx.transposed else (z, u)  # left^T dF/dx right
            row = grads(values, given[:n], left, create=True)
            product = sum((r * q.to(r.dtype)).sum() for r, q in zip(row, right, strict=True))
            assert isinstance(product, Tensor)
            found = grads([product], given, [torch.ones_like(product)], create=again)
        cotangents = [-g if w else None for g, w in zip(found, wanted, strict=True)]
        return (None, None, *cotangents, *z)
