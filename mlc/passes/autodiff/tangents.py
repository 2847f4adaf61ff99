"""Forward mode through a program: values and k tangents together, one fused loop for every loop.

A fused loop carries the states and their tangents; nothing is emitted per trip, so memory does not grow with the
number of trips.  The k tangents of a value are one value with a leading dimension of k (none for k = 1).  A value
that no meta-parameter has reached has no tangent at all; which carries have one is a fixpoint over the trips.

Before: inner gradients are lowered (a tangent of a gradient is then its mixed product, pushed forward).
After: one equation list in which every tangent follows its value.  Cost: the program itself and k tangents of
every active equation (Wengert 1964; Franceschi et al. 2017, "Forward and reverse gradient-based hyperparameter
optimization", for the trade against reverse).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.communication.collectives import is_collective
from mlc.ir.core import Alias, Custom, Eqn, Index, Loop, Pack, Region, SafeSqrt, Stop, Var, aten, map_vars
from mlc.ir.lowered.loopview import LoopView
from mlc.ir.opaque.call import Call
from mlc.ir.opaque.estimates import Solve
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType, TensorType, Type
from mlc.passes.autodiff.forward import NotForward, push_eqn
from mlc.passes.autodiff.reverse import Inside, Through, loop_activity
from mlc.passes.autodiff.transpose import forward_rule
from mlc.passes.autodiff.vmapped import batched_type, inline_batched, slice_type
from mlc.passes.rules.recorded import NoRule

__all__ = ["Pusher"]


class Pusher:
    """Copies equations into a builder, each followed by its tangent.

    Args:
        b: Where to emit.
        k: Number of tangents; one is not batched.
        through: Which stops let a tangent pass inside loops (see :func:`mlc.passes.autodiff.reverse.active_vars`).
        passes: Which stops of the region itself do.
    """

    def __init__(self, b: Builder, k: int, through: Inside, passes: Callable[[Eqn], bool]) -> None:
        self.b = b
        self.k = k
        self.through: Through = through
        self.passes = passes
        self.env: dict[Var, Var] = {}
        self.tan: dict[Var, Var] = {}

    def lift(self, t: Type) -> Type:
        """Type of the tangents of a value of type ``t``."""
        return batched_type(t, self.k) if self.k > 1 else _contiguous(t)

    def run(self, region: Region) -> None:
        """All equations of a region whose inputs are in ``env``, with their tangents in ``tan``."""
        for e in region.eqns:
            try:
                if isinstance(e.op, Loop) and not isinstance(e.op, Solve):
                    self._loop(e)
                else:
                    self._push(self._copy(e))
            except NotForward:
                raise
            except NoRule as why:
                where = f" (line {e.loc.line})" if e.loc is not None else ""
                raise NotForward(f"{why}{where}") from why

    def _copy(self, e: Eqn) -> Eqn:
        """The equation over the builder's values; stops are never merged, as only some let a tangent pass."""
        if isinstance(e.op, Stop):
            here = e.with_(args=(self.env[e.args[0]],), outs=(Var(e.outs[0].type),))
            self.b.append(here)
            self.env[e.outs[0]] = here.outs[0]
            if self.passes(e) and here.args[0] in self.tan:
                self.tan[here.outs[0]] = self.tan[here.args[0]]
            return here
        outs = self.b.copy_eqn(e, self.env)
        kwargs = tuple([(n, map_vars(v, self.env.__getitem__)) for n, v in e.kwargs])
        return e.with_(args=map_vars(e.args, self.env.__getitem__), kwargs=kwargs, outs=outs)

    def _push(self, e: Eqn) -> None:
        """Tangents of one equation's results."""
        if isinstance(e.op, Stop) or not any(v in self.tan for v in e.inputs):
            return
        if is_collective(e):
            where = f" (line {e.loc.line})" if e.loc is not None else ""
            raise NotForward(f"tangents of one process's meta-parameters do not go through a collective{where}")
        if self.k == 1 or isinstance(e.op, Alias | Index | Custom) or e.impure:
            push_eqn(self.b, e, self.tan)
        elif isinstance(e.op, Call):
            raise NotForward(f"{e.op.title} runs as it is, with one tangent at a time")
        elif isinstance(e.op, SafeSqrt):
            self.tan[e.outs[0]] = self._safe_sqrt(e)
        elif isinstance(e.op, Pack):
            parts = tuple(self.tan[v] if v in self.tan else self._zero(v.type) for v in e.args)
            self.tan[e.outs[0]] = self.b.emit(Pack(), parts, (self.lift(e.outs[0].type),))[0]
        else:
            self._push_aten(e)

    def _push_aten(self, e: Eqn) -> None:
        ins = e.inputs
        live = [self.tan[v] for v in ins if v in self.tan]
        if not any(v.type.is_float for v in e.outs) or all(t in self.b.zeros for t in live):
            return
        rule = forward_rule(e, tuple([slice_type(self.tan[v].type) if v in self.tan else None for v in ins]))
        found = inline_batched(
            self.b, rule.region, [*ins, *e.outs, *live], set(live), self.k, tag=Origin.TANGENT, loc=e.loc
        )
        outs = iter(found)
        for v, has in zip(e.outs, rule.present, strict=True):
            t = next(outs) if has else None
            if t is not None and v.type.is_float:
                self.tan[v] = t

    def _safe_sqrt(self, e: Eqn) -> Var:
        """0.5 t / y where y > 0, else 0; y is broadcast over the tangents."""
        y, t = e.outs[0], self.tan[e.args[0]]
        ty, wide = y.type, self.lift(y.type)
        assert isinstance(ty, TensorType)
        mask = TensorType(torch.bool, ty.shape, ty.stride, ty.device)
        (zero,) = self.b.emit(aten("eq", "Scalar"), (y, 0), (mask,))
        (half,) = self.b.emit(aten("mul", "Scalar"), (t, 0.5), (t.type,), tag=Origin.TANGENT)
        (quotient,) = self.b.emit(aten("div", "Tensor"), (half, y), (wide,), tag=Origin.TANGENT)
        return self.b.emit(aten("masked_fill", "Scalar"), (quotient, zero, 0), (wide,), tag=Origin.TANGENT)[0]

    def _zero(self, t: Type) -> Var:
        if isinstance(t, SeqType):
            if t.length is None:
                raise NotForward("the tangent of a sequence of unknown length is not known to be zero")
            elem = self._zero(t.elem)
            return self.b.emit(Pack(), (elem,) * t.length, (self.lift(t),))[0]
        return self.b.zero(self.lift(t))

    # ---- loops

    def _loop(self, e: Eqn) -> None:
        """One loop over states and tangents; a loop that no tangent enters stays as it is."""
        if not any(self.env[v] in self.tan for v in e.inputs):
            self.b.copy_eqn(e, self.env)
            return
        if e.op.replay is not None:  # type: ignore[union-attr]
            raise NotForward("a loop that rebuilds its states is differentiated in reverse only")
        here = e.with_(args=map_vars(e.args, self.env.__getitem__))
        p = LoopView(here)
        carried, _ = loop_activity(here, set(self.tan), self.through)
        consts = [i for i, v in enumerate(p.consts) if v in self.tan]
        seqs = [i for i, v in enumerate(p.seqs) if v in self.tan]
        body, emits = self._body(p, carried, consts, seqs)
        init = [self.tan[v] if (v := p.init[i]) in self.tan else self._zero(v.type) for i in carried]
        args = (*p.init, *init, *p.consts, *[self.tan[p.consts[i]] for i in consts],
                *p.seqs, *[self.tan[p.seqs[i]] for i in seqs])  # fmt: skip
        op = p.op
        nc, nk = op.n_carry + len(carried), op.n_const + len(consts)
        fused = replace(op, body=body, n_carry=nc, n_const=nk)
        plain = [v.type for v in e.outs]
        lifted = [self.lift(plain[i]) for i in carried], [self.lift(p.emitted[i].type) for i in emits]
        types = [*plain[: op.n_carry], *lifted[0], *plain[op.n_carry :], *lifted[1]]
        outs = self.b.emit(fused, args, types, loc=e.loc, tag=Origin.FUSED)
        primal = [*outs[: op.n_carry], *outs[nc : nc + op.n_emit]]
        self.env.update(zip(e.outs, primal, strict=True))
        self.tan.update((primal[i], t) for i, t in zip(carried, outs[op.n_carry : nc], strict=True))
        self.tan.update((primal[op.n_carry + i], t) for i, t in zip(emits, outs[nc + op.n_emit :], strict=True))

    def _body(self, p: LoopView, carried: list[int], consts: list[int], seqs: list[int]) -> tuple[Region, list[int]]:
        """Body of the fused loop, and which emitted sequences have tangents."""
        deep = self.through is True
        inner = Pusher(Builder(policy=self.b.policy), self.k, bool(deep) or "inner",
                       lambda x: isinstance(x.op, Stop) and not x.op.always and (deep or x.op.inner))  # fmt: skip
        b = inner.b
        for ins, active in ((p.in_carry, carried), (p.in_const, consts), (p.in_seq, seqs)):
            inner.env.update([(v, b.input(v.type)) for v in ins])
            inner.tan.update([(inner.env[ins[i]], b.input(self.lift(ins[i].type))) for i in active])
        inner.run(p.op.body)
        env, tan = inner.env, inner.tan
        ends = [env[p.next[i]] for i in carried]
        emits = [i for i, v in enumerate(p.emit) if env[v] in tan]
        outs = [
            *[env[v] for v in p.next],
            *[tan[v] if v in tan else inner._zero(v.type) for v in ends],
            *[env[v] for v in p.emit],
            *[tan[env[p.emit[i]]] for i in emits],
        ]
        return b.region(outs), emits


def _contiguous(t: Type) -> Type:
    return SeqType(_contiguous(t.elem), t.length) if isinstance(t, SeqType) else contiguous_type(t)
