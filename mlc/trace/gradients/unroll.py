"""The plain unroll: a flat recording, run eagerly under PyTorch's own autograd.

A referee (and the way to values that PyTorch's own graph does not have while the loop is recorded) that shares the
recording with the compiler, but none of its passes, rules or stages: operators are
differentiated by PyTorch, inner gradients by ``torch.autograd.grad(create_graph=True)``, nothing is rolled,
saved or recomputed by us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.ir.call import Call
from mlc.ir.core import (
    Alias,
    Custom,
    Draw,
    Eqn,
    Grad,
    Random,
    Region,
    SafeSqrt,
    Seed,
    Stop,
    Var,
    aten,
    map_vars,
)
from mlc.ir.types import TensorType
from mlc.passes.rules import norms
from mlc.runtime.interpreter.interpreter import run_random

__all__ = ["Unroll"]

_BATCH_NORM = aten("native_batch_norm")
_VIEWS = {aten("view"), aten("_unsafe_view"), aten("_reshape_alias")}


class Unroll:
    """Runs a recording eagerly.

    Args:
        eqns: The equations of the recording.
        given: The values that it takes from outside.
        stop: Meaning of stops, ``"all"`` or ``"inner"`` (see :func:`mlc.compile`).
        frozen: Values to use for stops instead of computing them (for differences).

    Attributes:
        stopped: After a run, the values of the stops that hold for the outermost gradient.
        taking: The inner gradient being taken, None for the outermost.
    """

    def __init__(
        self, eqns: Sequence[Eqn], given: Sequence[Var], stop: str = "all", frozen: dict[Eqn, Tensor] | None = None
    ) -> None:
        self.eqns = eqns
        self.given = given
        self.stop = stop
        self.frozen = frozen or {}
        self.stopped: dict[Eqn, Tensor] = {}
        self.taking: Eqn | None = None
        self._owner = _owners(eqns) if stop == "inner" else {}
        self._targets = {v for e in eqns if isinstance(e.op, Grad) for v in _parts(e)[1]}

    def run(self, inputs: Sequence[Tensor], results: Sequence[Var]) -> list[Tensor]:
        """Values of the recording, connected to autograd.

        Args:
            inputs: One tensor per value from outside; those to differentiate require grad.
            results: The values wanted.
        """
        self.stopped.clear()
        env: dict[Var, Any] = {}
        with torch.enable_grad():
            for given, t in zip(self.given, inputs, strict=True):
                env[given] = self._define(given, t, ())
            for e in self.eqns:
                args = [env[v] for v in e.inputs]
                for v, t in zip(e.outs, self._eqn(e, env), strict=True):
                    env[v] = self._define(v, t, args)
        return [env[v] for v in results]

    def _define(self, v: Var, t: Tensor, args: Sequence[Any]) -> Tensor:
        """The tensor of a value: an object of its own, a leaf where a gradient is taken by it."""
        if any(t is a for a in args):
            t = t.view_as(t)
        if v in self._targets and not t.requires_grad and t.dtype.is_floating_point | t.dtype.is_complex:
            t = t.detach().requires_grad_()
        return t

    def _eqn(self, e: Eqn, env: dict[Var, Any]) -> list[Tensor]:
        op = e.op
        if isinstance(op, Grad):
            return self._grad(e, env)
        if isinstance(op, Stop):
            return [self._stop(e, env[e.args[0]])]
        if isinstance(op, Draw):
            return self.draw(op)
        return _apply(e, env)

    def _stop(self, e: Eqn, x: Tensor) -> Tensor:
        assert isinstance(e.op, Stop)
        if e.op.inner or e in self._owner:
            gate: Any = _Gate
            return gate.apply(x, self, e) if x.requires_grad else x
        value = self.frozen.get(e, x).detach()
        self.stopped[e] = value
        return value.clone()

    def holds(self, e: Eqn) -> bool:
        """Whether a stop for some gradients only holds for the one being taken."""
        if self.stop == "inner" and e in self._owner:
            return self.taking is not None and self._owner.get(e) is self.taking
        if self.taking is None:
            return False
        assert isinstance(e.op, Stop) and isinstance(self.taking.op, Grad)
        return e.op.level is not None and e.op.level <= self.taking.op.depth

    def draw(self, op: Draw) -> list[Tensor]:
        """The next item of an iterable."""
        raise NotImplementedError

    def _grad(self, e: Eqn, env: dict[Var, Any]) -> list[Tensor]:
        losses, wrt, seeds = ([env[v] for v in part] for part in _parts(e))
        pairs = [(a, s) for a, s in zip(losses, seeds, strict=True) if a.requires_grad]
        if not pairs:
            return [torch.zeros_like(t) for t in wrt]
        before, self.taking = self.taking, e
        try:
            found = torch.autograd.grad(
                [a for a, _ in pairs], wrt, [s for _, s in pairs], create_graph=True, allow_unused=True
            )
        finally:
            self.taking = before
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, wrt, strict=True)]


def _parts(e: Eqn) -> tuple[Sequence[Var], Sequence[Var], Sequence[Var]]:
    """Losses, targets and seeds of a gradient."""
    assert isinstance(e.op, Grad)
    n, m = e.op.n_loss, e.op.n_loss + e.op.n_wrt
    return e.args[:n], e.args[n:m], e.args[m:]


def _owners(eqns: Sequence[Eqn]) -> dict[Eqn, Eqn]:
    """Under ``"inner"``: the first gradient that each stop stands in the way of."""
    producer = {v: e for e in eqns for v in e.outs}
    owner: dict[Eqn, Eqn] = {}
    for grad in eqns:
        if not isinstance(grad.op, Grad):
            continue
        losses, wrt, _ = _parts(grad)
        fence, todo, seen = set(wrt), list(losses), set()
        while todo:
            e = producer.get(todo.pop())
            if e is None or e in seen:
                continue
            seen.add(e)
            if isinstance(e.op, Stop):
                owner.setdefault(e, grad)
            todo.extend(v for v in e.inputs if v not in fence)
    return owner


class _Gate(torch.autograd.Function):
    """A stop that holds for some gradients only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unroll: Unroll, e: Eqn) -> Tensor:
        ctx.gate = (unroll, e)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Any:
        unroll, e = ctx.gate
        return torch.zeros_like(ct) if unroll.holds(e) else ct, None, None


class _Rule(torch.autograd.Function):
    """A custom Function of the user's, by its recorded backward; differentiable again."""

    @staticmethod
    def forward(ctx: Any, op: Custom, *args: Any) -> Any:
        outs = tuple(a.clone() for a in args[op.n_in : op.n_in + op.n_out])
        ctx.op = op
        ctx.save_for_backward(*args[: op.n_in], *outs, *args[op.n_in + op.n_out :])
        ctx.mark_non_differentiable(*[o for o in outs if not o.dtype.is_floating_point | o.dtype.is_complex])
        return outs

    @staticmethod
    def backward(ctx: Any, *cts: Any) -> Any:
        op: Custom = ctx.op
        saved = ctx.saved_tensors
        outs = saved[op.n_in : op.n_in + op.n_out]
        given = [torch.zeros_like(o) if c is None else c for o, c in zip(outs, cts, strict=True)]
        found = iter(_region(op.backward, [*saved, *given]))
        wanted = [next(found) if has else None for has in op.present]
        return (None, *wanted, *[None] * (len(saved) - op.n_in))


def _region(region: Region, inputs: Sequence[Any]) -> list[Any]:
    env: dict[Var, Any] = dict(zip(region.inputs, inputs, strict=True))
    for e in region.eqns:
        env.update(zip(e.outs, _apply(e, env), strict=True))
    return [env[v] for v in region.outputs]


def _apply(e: Eqn, env: dict[Var, Any]) -> list[Tensor]:
    """One equation that is neither a gradient nor a draw, under autograd."""
    op = e.op
    args = [map_vars(a, env.__getitem__) for a in e.args]
    kwargs = {k: map_vars(a, env.__getitem__) for k, a in e.kwargs}
    if isinstance(op, Alias):
        return [a.view_as(a) for a in args[: len(e.outs)]]
    if isinstance(op, Stop):
        return [args[0].detach().clone()]
    if isinstance(op, Seed):
        torch.manual_seed(op.value)
        return []
    if isinstance(op, SafeSqrt):
        return [_safe_sqrt(args[0])]
    if isinstance(op, Custom):
        rule: Any = _Rule
        return _flat(rule.apply(op, *args))
    if isinstance(op, Call):
        return op.callee.connected(args)
    if isinstance(op, Random):
        with torch.no_grad():
            return run_random(op, args, kwargs)
    if op in _VIEWS:
        return [args[0].reshape(args[1])]
    if op is aten("as_strided"):
        return [_as_strided(e, args)]
    if op is _BATCH_NORM and not args[5] and any(t is not None and t.requires_grad for t in args[3:5]):
        return list(norms.batch_norm(*args))  # PyTorch takes running statistics for constants
    assert callable(op), op
    return _flat(op(*args, **kwargs))


def _safe_sqrt(x: Tensor) -> Tensor:
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())


def _as_strided(e: Eqn, args: Sequence[Any]) -> Tensor:
    """``as_strided`` reads memory: its input must lie as it did when it was recorded."""
    x, t = args[0], e.args[0].type
    assert isinstance(t, TensorType)
    if x.stride() != t.stride or x.storage_offset() != 0:
        x = torch.empty_strided(t.shape, t.stride, dtype=x.dtype, device=x.device).copy_(x)
    return torch.as_strided(x, *args[1:])


def _flat(result: object) -> list[Tensor]:
    if isinstance(result, (list, tuple)):
        return [t for r in result for t in _flat(r)]
    return [result] if isinstance(result, Tensor) else []
