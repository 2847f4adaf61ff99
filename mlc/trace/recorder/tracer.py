"""The tracer: a recorder that knows the user's tensors, optimizers, losses and loops.

The user's own objects stay in their hands while tracing: a real tensor that reaches an operator is looked up by
identity and its fake twin takes part instead, so modules and optimizers need no change.  ``backward``,
``autograd.grad`` become one first-class ``grad`` equation each; optimizer steps are recorded as the updates they make.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mlc.errors import CaptureError
from mlc.ir.core import Alias, Draw, Eqn, Grad, Seed, Var
from mlc.ir.types import Loc, TensorType
from mlc.passes.responses.response import Response
from mlc.record.recorder import Handle, Recorder, Storage
from mlc.record.views import IDENTITY_VIEWS
from mlc.trace.numbers.placeholders import TracedScalar
from mlc.trace.python.frames import Site, Sites
from mlc.trace.recorder.concrete import Guard, concrete
from mlc.trace.recorder.reach import Reach

__all__ = ["External", "Tracer"]

_BASE: Any = torch._C.TensorBase


@dataclass
class External:
    """A tensor from outside: the object itself, where it was found, and its first value."""

    tensor: Tensor
    path: tuple[Any, ...] | None
    var: Var
    handle: Handle
    fake: Any
    written: bool = False
    read: Loc | None = None
    held: Any = None
    kept: Any = None  # a copy of what it held, where code that is not seen may write to its memory
    parts: tuple[External, ...] = ()


@dataclass
class Step:
    """One optimizer step seen while tracing."""

    optimizer: torch.optim.Optimizer
    first: int
    last: int
    loc: Loc | None


class Tracer(Recorder):
    """Records one call of the user's function."""

    current: ClassVar[Tracer | None] = None
    stops = True
    real = False

    def __init__(self, paths: dict[int, tuple[Any, ...]]) -> None:
        super().__init__(merge=False)
        self.sites = Sites()
        self._here: tuple[Loc | None, Site | None] | None = None
        self.paths = paths
        self.externals: dict[int, External] = {}
        self.grads: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.grad_reads: dict[int, tuple[Tensor, bool]] = {}
        self.steps: list[Step] = []
        self.flags: list[Any] = []
        self.counts: dict[int, Any] = {}
        self.dtypes: list[torch.dtype] = []
        self._open: list[tuple[str, bool, int]] = []
        self.grad_eqns: list[Eqn] = []
        self.leaves: dict[int, Tensor] = {}
        self.guards: list[Guard] = []
        self.fused: set[int] = set()  # parameters of fused optimizers: their counts are float32 whatever the default
        self.farther = False  # whether some inner gradients go ways that PyTorch's graph does not have
        self.declared: list[str] = []  # names of the levels (:func:`mlc.level`) that are open
        self.flows: dict[Any, Response] = {}  # what was asked of levels from outside
        self.responses: dict[str, Response | None] = {}  # what was asked of levels there, by name
        self.decisions: list[tuple[Var, Any, str, Loc | None]] = []
        self._fakes: dict[int, FakeTensor] = {}
        self._by_storage: dict[int, External] = {}
        self._reach: dict[int, Reach] = {}

    def depth(self) -> int:
        """How many declared levels (:func:`mlc.level`) are open."""
        return len(self.declared)

    def level_name(self, depth: int | None = None) -> str:
        """The name of the innermost declared level that is open, or of the one at this depth; empty without one."""
        depth = len(self.declared) if depth is None else depth
        return self.declared[depth - 1] if 0 < depth <= len(self.declared) else ""

    # ---- places

    def locate(self) -> tuple[Loc | None, Site | None]:
        """See :class:`~mlc.trace.python.frames.Sites`; looked up once per operator."""
        return self.sites.here() if self._here is None else self._here

    def dispatch(self, func: Any, s: Any, special: Any, args: Any, kwargs: Any) -> Any:
        """As :meth:`Recorder.dispatch`."""
        before, self._here = self._here, self.sites.here()
        try:
            return super().dispatch(func, s, special, args, kwargs)
        finally:
            self._here = before

    def place(self) -> Loc | None:
        """The user's line now."""
        return self.sites.here()[0]

    def copying(self) -> bool:
        """See :meth:`Recorder.copying`."""
        f: FrameType | None = sys._getframe(2)
        while f is not None and f is not self.sites.base:
            if f.f_code is copy.deepcopy.__code__:
                return True
            f = f.f_back
        return False

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
            s.var = self._stop(s.var, h, level=self.depth())
        ext = h.storage.external
        if isinstance(ext, External):
            if ext.tensor._backward_hooks or ext.tensor._post_accumulate_grad_hooks:
                raise CaptureError(
                    "a tensor that the loop trains has a backward hook", loc=self.place(),
                    advice="remove the hook, or do what it does in the loop itself",
                )  # fmt: skip
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
        found = concrete(self, t)
        if found is None:
            raise CaptureError(
                f"{what} depends on the value of a tensor, which is not known while tracing", loc=self.place(),
                advice="use torch.where for a choice inside the program, or take the decision outside of it",
            )  # fmt: skip
        value = kind(found.value)
        if found.externals:
            self.guards.append(Guard(found.var, found.eqns, found.externals, kind, value))
        return value

    def item(self, t: Tensor) -> Any:
        """What ``t.item()`` gives the user while tracing: a number if it is a literal, else a placeholder."""
        found = concrete(self, t)
        if found is not None and not found.externals:
            return found.value
        with torch.no_grad():
            return TracedScalar(t.detach())

    # ---- gradients

    def reached(self, losses: Sequence[Var], targets: Sequence[Var], depth: int) -> set[Var]:
        """Targets that the losses depend on differentiably for a gradient taken at this loop depth."""
        known = self._reach.get(depth)
        if known is None or known.builder is not self.builder:  # the backward of a custom function is a recording apart
            known = Reach(self.builder, self._bit_of, depth)
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
                "backward() or grad() of a loss that does not depend on anything that requires grad", loc=loc,
                advice="check for detach() or no_grad() between the parameters and the loss",
            )  # fmt: skip
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

    def set_grad(self, t: Tensor, g: Tensor | None) -> None:
        """Set ``.grad``."""
        self.grads[id(t)] = (t, g)

    def same_memory(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors are the whole of one memory."""
        x, y = self.handle(a), self.handle(b)
        whole = all(step[0] in IDENTITY_VIEWS for h in (x, y) for step in h.chain)
        return x.storage is y.storage and whole and a.shape == b.shape

    # ---- optimizer steps

    def step_begins(self, opt: torch.optim.Optimizer) -> None:
        """Everything until :meth:`step_ends` is an update."""
        self._open.append((self.tag, self.safe_sqrt, len(self.builder.eqns)))
        self.tag, self.safe_sqrt = "update", True

    def step_ends(self, opt: torch.optim.Optimizer) -> None:
        """The update is complete."""
        self.tag, self.safe_sqrt, first = self._open.pop()
        self.steps.append(Step(opt, first, len(self.builder.eqns), self.place()))

    def leaf_copy(self, t: Tensor, is_parameter: bool) -> Tensor:
        """A fresh leaf whose value is that of ``t``, derivative included."""
        v = self.value(self.handle(t))
        if t.requires_grad and t.is_leaf:
            self.read(t, False)
            v = self.value(self.handle(t))
        (new,) = self._emit(Alias(), (v,), (v.type,))
        f = self.fresh(new)
        if not is_parameter:
            return f
        with torch.utils._python_dispatch._disable_current_modes(), self.fake_mode:
            p = torch.nn.Parameter(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device),
                                   requires_grad=t.requires_grad)  # fmt: skip
        self.wrap(p, new)  # type: ignore[arg-type]
        if p.requires_grad:
            h = self.handle(p)
            h.leaf = h.storage.leaf = h.storage.copied = True
            self.new_bit(new)
            self.leaves[id(p)] = p
        return p

    # ---- draws

    def before_item(self) -> Any:
        """An iterable of the user's is about to run."""
        return None

    def after_item(self, key: tuple[int, int, int], before: Any) -> None:
        """An iterable of the user's ran: item ``key[2]`` of its iteration ``key[1]`` (-1: the iteration began)."""

    def seed(self, value: int) -> None:
        """``torch.manual_seed`` in the loop."""
        loc, site = self.locate()
        self.builder.append(Eqn(Seed(value), (), (), (), loc, "draw", site))

    def drawn(self, source: int, visit: int, tensors: Sequence[Tensor]) -> None:
        """An iterable produced an item: one equation, one value per tensor in it."""
        loc, site = self.locate()
        outs = tuple(Var(TensorType.of(t)) for t in tensors)
        self.builder.append(Eqn(Draw(source, visit), (), outs, (), loc, "draw", site))
        for t, v in zip(tensors, outs, strict=True):
            self.draw_tensor(t, v)
