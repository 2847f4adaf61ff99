"""Gradients as equations: one first-class ``grad`` equation for each that is taken, and the tensors that hold them.

What is accumulated where, and what is followed, is looked at when PyTorch has done it (:mod:`.taken`); backward hooks
(:mod:`.hooks`) take more gradients on the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.errors import CaptureError
from mlc.ir.core import Eqn, Grad, Var
from mlc.ir.types import Loc, TensorType
from mlc.trace.gradients.grads import get_grad, put_grad
from mlc.trace.recorder.observer import Observer
from mlc.trace.recorder.reach import Reach

__all__ = ["GradientStore", "laid_out"]

_OWN = 1 << 30  # so deep that nothing is followed but PyTorch's own graph


class GradientStore(ABC):
    """The gradients of one run, in its recording.

    Args:
        observer: The recorder of the run.

    Attributes:
        create_graph: Of the gradient that is taken now.
        stopped: Leaves without a gradient by identity: the leaf, the losses, its value, the line and the depth.
        held: What ``.grad`` held before the ``backward()`` that runs, by the identity of the leaf.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.create_graph = False
        self.stopped: dict[int, Any] = {}
        self.held: dict[int, Tensor] = {}
        self._reach: dict[tuple[int, bool], Reach] = {}
        self._followed: set[Var] = set()  # gradients taken with create_graph

    @abstractmethod
    def before(self, v: Var) -> Var:
        """The value whose gradient is that of a tensor which now has ``v`` (another one where hooks stand)."""

    def equation(
        self, pairs: list[tuple[Var, Var]], targets: Sequence[Var], loc: Loc | None, site: object, depth: int
    ) -> list[Var]:
        """One ``grad`` equation; its results."""
        ob = self.observer
        mask = 0
        for v, _ in pairs:
            mask |= v.mask
        outs = tuple(Var(v.type, mask) for v in targets)
        if ob.opaque and targets:
            self._refuse_opaque([v for v, _ in pairs])
        args = (*[v for v, _ in pairs], *targets, *[s for _, s in pairs])
        eqn = Eqn(Grad(len(pairs), len(targets), depth), args, outs, (), loc, "grad", site)
        if targets:
            ob.builder.append(eqn)
            ob.grad_eqns.append(eqn)
            if self.create_graph:
                self._followed.update(outs)
        return list(outs)

    def _refuse_opaque(self, losses: Sequence[Var]) -> None:
        """PyTorch's graph takes in-place collectives for the identity: a gradient through one is not the derivative."""
        found = self.reach().among(losses, list(self.observer.opaque))
        if found:
            raise CaptureError(
                "a gradient is taken through an in-place collective, which PyTorch's graph takes for the identity",
                loc=self.observer.opaque[next(iter(found))],
                advice="use torch.distributed.nn.functional.all_reduce, or take the gradient of the loss before it and "
                "reduce loss.detach().clone()",
            )

    def constant(self, e: Eqn) -> bool:
        """Whether it is a gradient taken without create_graph."""
        return isinstance(e.op, Grad) and not any(v in self._followed for v in e.outs)

    def changed(self, where: int) -> None:
        """The recording was changed from this equation on."""
        for r in self._reach.values():
            r.rewind(where)

    def reach(self, depth: int | None = None, through: bool = False) -> Reach:
        """Dependence for gradients taken here, or in this number of declared levels."""
        ob = self.observer
        depth = ob.depth() if depth is None else depth
        key = (depth, through)
        known = self._reach.get(key)
        if known is None or known.builder is not ob.builder:
            known = Reach(ob.builder, ob.bit_of, depth, through, own=depth == _OWN)
            if not ob.nested:
                self._reach[key] = known
        return known

    def _values(self, t: Tensor, losses: Sequence[Var], reached: int) -> list[Var]:
        """Values of a target that the losses depend on: the present one, and earlier ones of a leaf written since."""
        ob = self.observer
        now = ob.read(t, True) if t.requires_grad else ob.present(t)
        now = self.before(now)
        out = [now] if self.reach().among(losses, [now]) else []
        if t.is_leaf and t.requires_grad:
            bits = ob.leaf_bits.get(id(t), 0) & ~ob.bit_of.get(now, 0)
            if bits & reached:  # written since the loss read it
                history = reversed(ob.leaf_history[id(t)])
                out += [v for v in history if v is not now and ob.bit_of.get(v, 0) & reached]
        return out

    def taken(self, pairs: list[tuple[Var, Var]], wrt: Sequence[Tensor]) -> tuple[list[Var | None], list[bool]]:
        """The value of each gradient (None: no path), and whether it goes ways that PyTorch's graph does not have."""
        ob = self.observer
        values = [v for v, _ in pairs]
        reach = self.reach()
        own, beyond = self.reach(_OWN).bits(values), reach.beyond(values)
        groups = [self._values(t, values, own) for t in wrt]
        outs = iter(self.equation(pairs, [v for g in groups for v in g], *ob.locate(), ob.depth()))
        found: list[Var | None] = []
        for g in groups:
            parts = [next(outs) for _ in g]
            total = parts[0] if parts else None
            for p in parts[1:]:
                (total,) = ob.emit(torch.ops.aten.add.Tensor, (total, p), (p.type,))
            found.append(total)
        more = [any(ob.bit_of.get(v, 0) & beyond for v in g) for g in groups]
        lost = self.reach(through=True).beyond(values) & ~beyond
        for g, total in zip(groups, found, strict=True):
            if total is not None and ob.bit_of.get(g[0], 0) & lost:
                ob.dropped[total] = (tuple(values), g[0], ob.place(), ob.depth())
        if lost:
            self._unreached(values, wrt, lost)
        return found, more

    def _unreached(self, values: Sequence[Var], wrt: Sequence[Tensor], lost: int) -> None:
        """Leaves that get no gradient at all here, though a training leads to them."""
        ob = self.observer
        have = {id(t) for t in wrt}
        for t in ob.leaves.values():
            now = ob.leaf_history.get(id(t), [None])[-1]
            if id(t) not in have and now is not None and ob.bit_of.get(now, 0) & lost:
                self.stopped.setdefault(id(t), (t, tuple(values), now, ob.place(), ob.depth()))

    def zero(self, g: Tensor) -> None:
        """PyTorch has a path that carries nothing (through integers, or an input that a rule ignores).

        Raises:
            CaptureError: where it carries something.
        """
        ob = self.observer
        with ob.pause():
            carries = g.layout is not torch.strided or bool((g != 0).any())
        if carries:
            ob.refusal = ob.refusal or CaptureError(
                "PyTorch's graph has a way to this gradient that mlc did not see being made",
                loc=ob.place(),
                advice="take the operator on that way apart into torch functions, or report it",
            )
            raise ob.refusal
        ob.zero(g)

    def bound(self, g: Tensor | None, v: Var, create_graph: bool) -> Tensor:
        """The gradient as a tensor with a memory of its own, laid out as the program has it."""
        ob = self.observer
        ty = v.type
        assert isinstance(ty, TensorType)
        with ob.pause(), torch.set_grad_enabled(create_graph):
            if g is None:
                g = torch.zeros(ty.shape, dtype=ty.dtype, device=ty.device)
            if ob.memories.find(g) is not None or (g._is_view() and not g.is_contiguous()):
                g = g.clone()
            if g.stride() != ty.stride and 0 not in ty.stride:
                g = laid_out(g, ty)
        h = ob.bind(g, v)
        h.storage.soft = not create_graph
        return g

    def accumulate(self, t: Tensor, old: Tensor | None, v: Var | None, beyond: bool, create_graph: bool) -> None:
        """What ``backward()`` did to ``t.grad``, which was ``old``."""
        ob = self.observer
        ob.set_grad(t)
        now = get_grad(t)
        if v is None:
            if old is None and now is not None:
                self.zero(now)
            return
        if beyond:
            now = self._set_beyond(t, old, ob.evaluate(v))
        if now is None:
            now = torch.zeros_like(t)
            put_grad(t, now)
        if old is None:
            self._hold(t, now, v, create_graph)
            return
        total = ob.add(ob.present(old), v)
        if now is old:
            ob.write(old, total)
        else:
            ob.bind(now, total).storage.soft = not create_graph

    def _set_beyond(self, t: Tensor, old: Tensor | None, g: Tensor) -> Tensor:
        ob = self.observer
        if old is None or get_grad(t) is not old:
            with ob.pause(), torch.no_grad():
                put_grad(t, g if old is None else old + g)
        else:  # in place, as PyTorch adds; what it added of its own is no part of the sum
            ob.will_write(old)
            with ob.pause(), torch.no_grad():
                old.copy_(self.held.get(id(t), old) + g)
        now = get_grad(t)
        assert now is not None
        return now

    def _hold(self, t: Tensor, g: Tensor, v: Var, create_graph: bool) -> None:
        ob = self.observer
        ty = v.type
        assert isinstance(ty, TensorType)
        if ob.memories.find(g) is not None:
            with ob.pause(), torch.set_grad_enabled(create_graph):
                g = g.clone()
                put_grad(t, g)
        if g.stride() != ty.stride and 0 not in ty.stride and g.dtype == ty.dtype:
            with ob.pause(), torch.set_grad_enabled(create_graph):
                g = laid_out(g, ty)
                put_grad(t, g)
        h = ob.bind(g, v)
        h.storage.soft = not create_graph


def laid_out(g: Tensor, ty: TensorType) -> Tensor:
    """A copy of a gradient in the layout of a type."""
    return torch.empty_strided(ty.shape, ty.stride, dtype=g.dtype, device=g.device).copy_(g)
