"""Tracing on fake tensors, without running: for models that do not fit on this machine.

The user's own objects stay in their hands: a real tensor that reaches an operator is looked up by identity and its fake
twin takes part instead, so modules and optimizers need no change. ``backward`` and ``autograd.grad`` become one
first-class ``grad`` equation each. What needs the value of a tensor is refused, unless it follows from literals and
small tensors that are there before the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mlc.errors import CaptureError
from mlc.ir.core import Alias, Eqn, Grad, Var
from mlc.ir.types import TensorType
from mlc.record.handles import Handle, Storage
from mlc.record.views import IDENTITY_VIEWS
from mlc.trace.numbers.placeholders import TracedScalar
from mlc.trace.python.places import Path
from mlc.trace.recorder.concrete import Guard, Known, concrete
from mlc.trace.recorder.externals import External
from mlc.trace.recorder.reach import Reach
from mlc.trace.recorder.tracer import Tracer

__all__ = ["FakeTracer"]

_BASE: Any = torch._C.TensorBase


class FakeTracer(Tracer):
    """Records one call of the user's function on fake tensors.

    Args:
        paths: Place of every tensor of the user's, by identity.

    Attributes:
        guards: Decisions that later calls must take alike.
    """

    def __init__(self, paths: dict[int, Path]) -> None:
        super().__init__(paths)
        self.guards: list[Guard] = []
        self._fakes: dict[int, FakeTensor] = {}
        self._by_storage: dict[int, External] = {}
        self._reach: dict[int, Reach] = {}

    # ---- tensors from outside

    def external(self, t: Tensor) -> Handle:
        """Register a real tensor of the user's."""
        if t.layout is not torch.strided:
            raise CaptureError(
                f"a {t.layout} tensor is used", loc=self.place(), advice="convert it with .to_dense() before the call"
            )
        same = self._by_storage.get(t.untyped_storage()._cdata)
        fake = self._fake_twin(t)
        if same is not None and TensorType.of(same.fake) == TensorType.of(fake):
            h = Handle(same.handle.storage)
            self.handles[id(t)] = (t, h)
            self._fakes[id(t)] = fake
            return h
        var = Var(TensorType.of(fake))
        ext = External(t, self.paths.get(id(t)), var, Handle(Storage(var)), fake, read=self.place())
        ext.handle.storage.external = ext
        self.adopt(t, ext)
        if t.requires_grad:
            self.new_bit(var)
            ext.handle.leaf = True
            if t.is_leaf:
                self.leaves[id(t)] = t
                ext.handle.storage.leaf = True
        return ext.handle

    def adopt(self, t: Tensor, ext: External) -> None:
        """Enter a real tensor into the tables."""
        self.handles[id(t)] = (t, ext.handle)
        self._fakes[id(t)] = ext.fake
        self.externals[id(t)] = ext
        self._by_storage[t.untyped_storage()._cdata] = ext

    def draw_tensor(self, t: Tensor, var: Var) -> None:
        """A tensor that an iterable of the user's just produced."""
        fake = self._fake_twin(t)
        h = Handle(Storage(var))
        h.storage.external = "draw"
        self.handles[id(t)] = (t, h)
        self._fakes[id(t)] = fake

    def _fake_twin(self, t: Tensor) -> FakeTensor:
        with torch.utils._python_dispatch._disable_current_modes(), self.fake_mode:
            f = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        assert isinstance(f, FakeTensor)
        return f

    def fake_of(self, t: Tensor) -> FakeTensor:
        """The fake twin of a registered tensor."""
        return self._fakes[id(t)]

    def wrote(self, h: Handle) -> None:
        """Remember writes to the user's memories; a step of a leaf is history for gradients at its own depth."""
        s = h.storage
        if s.leaf and not s.copied and s.var.mask:
            s.var = self.stopped(s.var, h, level=self.depth())
        ext = h.storage.external
        if isinstance(ext, External):
            if ext.tensor._backward_hooks or ext.tensor._post_accumulate_grad_hooks:
                raise CaptureError(
                    "a tensor that the loop trains has a backward hook",
                    loc=self.place(),
                    advice="remove the hook, or do what it does in the loop itself",
                )
            ext.written = True

    def read(self, t: Tensor, tracking: bool) -> Var:
        """As :meth:`Recorder.read`; notes leaves."""
        var = super().read(t, tracking)
        if t.requires_grad and t.is_leaf and not self.handle(t).hidden:
            self.leaves[id(t)] = t
        return var

    # ---- Python numbers

    def scalar(self, t: Tensor) -> Any:
        """C++ code asks for the number in a tensor."""
        return self.decide(t, lambda x: x, "a Python number")

    def decide(self, t: Tensor, kind: Callable[[Any], Any], what: str) -> Any:
        """The value of a one-element tensor that follows from literals and tensors from outside, with a guard.

        Raises:
            CaptureError: when it depends on what the program computes or draws.
        """
        found = self._known(t)
        if found is None:
            raise CaptureError(
                f"{what} depends on the value of a tensor, which is not known while tracing",
                loc=self.place(),
                advice="use torch.where for a choice inside the program, or take the decision outside of it",
            )
        value = kind(found.value)
        if found.externals:
            self.guards.append(Guard(found.var, found.eqns, found.externals, kind, value))
        return value

    def _known(self, t: Tensor) -> Known | None:
        """The value of a one-element tensor, if it is known while tracing."""
        if t.numel() != 1:
            return None
        return concrete(self.value(self.handle(t)), self.externals.values(), self.builder)

    def item(self, t: Tensor) -> Any:
        """What ``t.item()`` gives the user while tracing: a number if it is a literal, else a placeholder."""
        found = self._known(t)
        if found is not None and not found.externals:
            return found.value
        with torch.no_grad():
            return TracedScalar(t.detach())

    # ---- gradients

    def reached(self, losses: Sequence[Var], targets: Sequence[Var], depth: int) -> set[Var]:
        """Targets that the losses depend on differentiably for a gradient taken at this loop depth."""
        known = self._reach.get(depth)
        if known is None or known.builder is not self.builder:  # the backward of a custom function is a recording apart
            known = Reach(self.builder, self.bit_of, depth)
            if not self.nested:
                self._reach[depth] = known
        return known.among(losses, targets)

    def reachable_leaves(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Leaves whose present value a loss depends on."""
        leaves = [(t, self.value(self.handle(t))) for t in self.leaves.values() if t.requires_grad]
        values = [self.value(self.handle(t)) for t in losses]
        reached = self.reached(values, [v for _, v in leaves], self.depth())
        return [t for t, v in leaves if v in reached]

    def gradient(self, losses: Sequence[Tensor], wrt: Sequence[Tensor], seeds: Sequence[Tensor | None],
                 create_graph: bool = False) -> list[Tensor | None]:  # fmt: skip
        """One ``grad`` equation; None for values that no loss depends on."""
        loc, site = self.locate()
        depth = self.depth()
        pairs = []
        for t, s in zip(losses, seeds, strict=True):
            h = self.handle(t)
            if not self.carries(t, h):
                continue
            if s is None:
                with torch.no_grad(), self.active():
                    s = torch.ones_like(t)
            pairs.append((self.value(h), self.read(s, False)))
        if not pairs:
            raise CaptureError(
                "backward() or grad() of a loss that does not depend on anything that requires grad",
                loc=loc,
                advice="check for detach() or no_grad() between the parameters and the loss",
            )
        mask = 0
        for v, _ in pairs:
            mask |= v.mask
        values = [self.value(self.handle(t)) for t in wrt]
        reached = self.reached([v for v, _ in pairs], values, depth)
        targets = [v if v in reached else None for v in values]
        live = [v for v in targets if v is not None]
        outs = tuple(Var(v.type, mask) for v in live)
        n = len(pairs)
        eqn = Eqn(
            Grad(n, len(live), depth, self.level_name()),
            (*[v for v, _ in pairs], *live, *[s for _, s in pairs]),
            outs,
            (),
            loc,
            "grad",
            site,
        )
        if live:
            self.builder.append(eqn)
            self.grad_eqns.append(eqn)
        it = iter(outs)
        return [None if v is None else self._gradient_tensor(next(it), create_graph) for v in targets]

    def _gradient_tensor(self, v: Var, create_graph: bool) -> Tensor:
        t = self.fresh(v, taint=create_graph)
        self.handle(t).soft = not create_graph
        return t

    def accumulate(self, t: Tensor, g: Tensor) -> None:
        """``t.grad += g`` as backward() does."""
        old = self.get_grad(t)
        if old is None:
            self.set_grad(t, g)
            return
        total: Tensor
        with torch.no_grad(), self.active():
            if isinstance(old, FakeTensor):
                old.add_(g)
                total = old
            else:
                total = old + g  # the user's own .grad is set at the end, if at all
                self.set_grad(t, total)
        h, new = self.handle(total), self.handle(g)
        h.taint, h.soft = h.taint or new.taint, h.soft or new.soft

    def get_grad(self, t: Tensor) -> Tensor | None:
        """The ``.grad`` that the user sees while tracing."""
        entry = self.grads.get(id(t))
        if entry is not None:
            return entry[1]
        real: Tensor | None = _BASE.grad.__get__(t)
        if not isinstance(t, FakeTensor):
            self.grad_reads.setdefault(id(t), (t, real is None))
        return real

    def set_grad(self, t: Tensor, g: Tensor | None = None) -> None:
        """Set ``.grad``."""
        self.grads[id(t)] = (t, g)

    def same_memory(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors are the whole of one memory."""
        x, y = self.handle(a), self.handle(b)
        whole = all(step[0] in IDENTITY_VIEWS for h in (x, y) for step in h.chain)
        return x.storage is y.storage and whole and a.shape == b.shape

    # ---- copies

    def leaf_copy(self, t: Tensor, is_parameter: bool) -> Tensor:
        """A fresh leaf whose value is that of ``t``, derivative included."""
        v = self.value(self.handle(t))
        if t.requires_grad and t.is_leaf:
            self.read(t, False)
            v = self.value(self.handle(t))
        (new,) = self.emit(Alias(), (v,), (v.type,))
        f = self.fresh(new)
        if not is_parameter:
            return f
        with torch.utils._python_dispatch._disable_current_modes(), self.fake_mode:
            p = torch.nn.Parameter(
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device), requires_grad=t.requires_grad
            )
        self.wrap(p, new)  # type: ignore[arg-type]
        if p.requires_grad:
            h = self.handle(p)
            h.leaf = h.storage.leaf = h.storage.copied = True
            self.new_bit(new)
            self.leaves[id(p)] = p
        return p
