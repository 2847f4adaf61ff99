"""Values of tensors while recording: storages, views, in-place writes, leaves, and where differentiation is cut."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mlc.errors import CaptureError
from mlc.ir.builder import Builder
from mlc.ir.core import Eqn, Region, Stop, Var, aten
from mlc.ir.inplace import Schema
from mlc.ir.origin import Origin
from mlc.ir.trees import each_tensor, map_tensors, substitute
from mlc.ir.types import Loc, TensorType
from mlc.record import views
from mlc.record.fakes import Fakes
from mlc.record.handles import Handle, Storage

__all__ = ["Values"]


class Values(ABC):
    """What every tensor of a recording holds.  Subclasses say where code comes from and what unknown tensors are."""

    stops = False  # whether differentiation is cut where autograd would (programs; not rules)

    def __init__(self, *, merge: bool, fake_mode: FakeTensorMode | None) -> None:
        self.fake_mode = fake_mode or FakeTensorMode(allow_non_fake_inputs=False)
        self.fakes = Fakes(self.fake_mode)
        self.builder = Builder(merge=merge)
        self.handles: dict[int, tuple[Tensor, Handle]] = {}  # real tensors by identity
        self.literals: dict[int, FakeTensor] = {}
        self.tag: Origin = Origin.FORWARD
        self.nested = False  # recording a region of its own: what it derives must not be seen outside
        self._bits = 0
        self.bit_of: dict[Var, int] = {}
        self._stops: dict[Any, Var] = {}
        self._views: dict[Any, tuple[Var, ...]] = {}
        self.stop_log: list[Eqn] = []

    # ---- what subclasses decide

    def locate(self) -> tuple[Loc | None, Any]:
        """The user's place now, and the loop iterations it is in."""
        return None, None

    def copying(self) -> bool:
        """Whether ``copy.deepcopy`` is running."""
        return False

    def depth(self) -> int:
        """How many of the user's loops are running."""
        site = self.locate()[1]
        return 0 if site is None else len(site.path)

    def scope(self) -> Any:
        """Loop iterations now: derived values are not shared between iterations, which keeps these alike."""
        site = self.locate()[1]
        return None if site is None else site.path

    def external(self, t: Tensor) -> Handle:
        """A real tensor met for the first time."""
        raise CaptureError("a tensor from outside reached a recording that has none")

    def fake_of(self, t: Tensor) -> FakeTensor:
        """The fake twin of a real tensor."""
        raise CaptureError("a tensor from outside reached a recording that has none")

    @abstractmethod
    def active(self) -> AbstractContextManager[Any]:
        """Context in which operators are recorded, whether or not they are already."""

    @abstractmethod
    def plain(self, func: object, args: object, kwargs: object) -> Any:
        """Record an operator as it stands, whatever is special about it."""

    @abstractmethod
    def recorded(self, func: object, s: Schema, args: object, kwargs: object, out: object) -> Any:
        """Enter an operator that gave ``out`` as an equation; ``out``, or what stands for it."""

    @abstractmethod
    def write_region(self, op: object, args: object, index: int, base: object, new: object) -> Region | None:
        """``(base, new view) -> new base`` for result ``index`` of a view operator; None without a rule."""

    def scalar(self, t: Tensor) -> Any:
        """A Python number read from a tensor."""
        raise CaptureError("a Python number is read from a tensor", loc=self.locate()[0])

    def constant(self, t: Tensor, beside: tuple[Tensor | None, ...]) -> Tensor:
        """What an operator on ``t`` and these tensors reads of ``t``, where PyTorch does not follow it."""
        return t

    # ---- values of tensors

    @contextlib.contextmanager
    def recording_apart(self) -> Iterator[None]:
        """Record into a builder of its own: what is derived there is not seen outside."""
        saved = self.builder, self._stops, self._views
        self.nested = True
        self.builder, self._stops, self._views = Builder(merge=False), dict(saved[1]), dict(saved[2])
        try:
            yield
        finally:
            self.builder, self._stops, self._views = saved
            self.nested = False

    def new_bit(self, v: Var) -> int:
        """Mark ``v`` as a differentiable leaf value of its own."""
        bit = self.bit_of.get(v)
        if bit is None:
            bit = 1 << self._bits
            self._bits += 1
            self.bit_of[v] = bit
            v.mask |= bit
        return bit

    def handle(self, t: Tensor) -> Handle:
        """The handle of any tensor."""
        if type(t) is FakeTensor or isinstance(t, FakeTensor):
            h = getattr(t, "_mlc", None)
            if h is None:
                raise CaptureError(
                    "a tensor appeared that mlc did not see being made",
                    loc=self.locate()[0],
                    advice="create tensors inside the compiled function with ordinary torch calls",
                )
            return h  # type: ignore[no-any-return]
        entry = self.handles.get(id(t))
        return self.external(t) if entry is None else entry[1]

    def value(self, h: Handle) -> Var:
        """Current value of a handle, deriving views of written storages anew."""
        s = h.storage
        if not h.chain:
            return s.var
        if h.version != s.version or h.cached is None:
            var = s.var
            if s.leaf:
                self.new_bit(var)
            for op, args, kwargs, index, types, loc in h.chain:
                if op in views.IDENTITY_VIEWS:
                    continue
                key = (self.scope(), var, op, repr(args), repr(kwargs))
                outs = self._views.get(key)
                if outs is None:
                    outs = self.emit(views.PHYSICAL.get(op, op), (var, *args), types, kwargs, loc=loc)
                    self._views[key] = outs
                var = outs[index]
            if self.nested:
                return var
            h.cached, h.version = var, s.version
        return h.cached

    def differentiated(self, *tensors: Tensor | None) -> bool:
        """Whether any of these depends on something that is differentiated."""
        return any(t is not None and self.value(self.handle(t)).mask for t in tensors)

    def carries(self, t: Tensor, h: Handle) -> bool:
        """Whether the tensor carries a derivative here."""
        return h.taint or (t.requires_grad and not h.hidden)

    def read(self, t: Tensor, tracking: bool) -> Var:
        """The value an operator reads from ``t``; a stop where differentiation is cut."""
        h = self.handle(t)
        var = self.value(h)
        if not self.stops:
            return var
        if t.requires_grad and t.is_leaf and not h.hidden:
            if not h.leaf:
                h.leaf = True
                if var.mask and h.storage.external is None:
                    var = self.stopped(var, h)
                    self._own(h, var)
                h.storage.leaf = h.storage.leaf or not h.chain
            self.new_bit(var)
        elif tracking and var.mask and not self.carries(t, h) and t.dtype.is_floating_point | t.dtype.is_complex:
            return self.stopped(var, h, level=self.depth() if h.soft else None)
        return var

    def _own(self, h: Handle, var: Var) -> None:
        """Give a new leaf a memory of its own when it shared one, else make ``var`` its value."""
        if h.chain:
            h.storage, h.chain = Storage(var), ()
        else:
            h.storage.var = var

    def stopped(self, var: Var, h: Handle, *, level: int | None = None) -> Var:
        """The value behind a stop for derivatives of this depth (None: all)."""
        key = (self.scope(), var, level, self.tag == Origin.STATE)
        known = self._stops.get(key)
        if known is None:
            known = Var(var.type)
            loc, site = self.locate()
            tag = Origin.COPY if h.copy else self.tag
            eqn = Eqn(Stop(level), (var,), (known,), (), h.origin or loc, tag, site)
            known.mask = 0 if level is None else var.mask
            self.builder.append(eqn)
            self.stop_log.append(eqn)
            self._stops[key] = known
        return known

    def emit(self, op: Any, args: Any, types: Sequence[Any], kwargs: Any = (), loc: Loc | None = None) -> Any:
        """Append an equation at the user's place now (or ``loc``); its results."""
        here, site = self.locate()
        b = self.builder
        n = len(b.eqns)
        outs = b.emit(op, args, types, tuple(kwargs), loc or here, self.tag, site, simplify=b._merge)
        if len(b.eqns) > n:
            mask = 0
            for v in b.eqns[-1].inputs:
                mask |= v.mask
            if mask:
                for o in outs:
                    if o.type.is_float:
                        o.mask = mask
        return outs

    def wrap(self, t: FakeTensor, var: Var, *, taint: bool = False, origin: Loc | None = None) -> FakeTensor:
        """Attach a value to a fresh fake tensor."""
        h = Handle(Storage(var), (), origin)
        h.taint = taint
        t._mlc = h  # type: ignore[attr-defined]
        return t

    def fresh(self, var: Var, *, taint: bool = False) -> FakeTensor:
        """A new fake tensor that holds ``var``."""
        t = var.type
        assert isinstance(t, TensorType)
        with torch.utils._python_dispatch._disable_current_modes():
            f = self.fakes.make(t)
        return self.wrap(f, var, taint=taint, origin=self.locate()[0])

    def write(self, t: Tensor, new: Var) -> None:
        """The tensor ``t`` now holds ``new``; its storage and the storage's other views follow."""
        h = self.handle(t)
        ty = self.fakes.type(self.twin(t))
        new = self.fitted(new, ty)
        steps: list[Var] = [h.storage.var]
        for op, args, kwargs, index, types, loc in h.chain[:-1]:
            base = steps[-1]
            if op not in views.IDENTITY_VIEWS:
                base = self.emit(views.PHYSICAL.get(op, op), (base, *args), types, kwargs, loc)[index]
            steps.append(base)
        for (op, args, _, index, _, _), base in zip(reversed(h.chain), reversed(steps), strict=False):
            new = self._through(op, args, index, base, new)
        h.storage.var = new
        h.storage.version += 1
        self.wrote(h)

    @abstractmethod
    def wrote(self, h: Handle) -> None:
        """A storage changed (subclasses watch the user's memories)."""

    def _through(self, op: object, args: object, index: int, base: Var, new: Var) -> Var:
        if op in views.IDENTITY_VIEWS:
            return new
        region = self.write_region(op, args, index, base.type, new.type)
        if region is None:
            raise CaptureError(
                f"an in-place write through a view made by {op} cannot be expressed as a function",
                loc=self.locate()[0],
                advice="write the result to a new tensor instead of in place",
            )
        env = dict(zip(region.inputs, (base, new), strict=True))
        for e in region.eqns:
            a = tuple(substitute(x, env) for x in e.args)
            env.update(zip(e.outs, self.emit(e.op, a, [v.type for v in e.outs], e.kwargs), strict=True))
        return env[region.outputs[0]]

    def fitted(self, v: Var, ty: TensorType) -> Var:
        """Cast and broadcast as an in-place write does."""
        assert isinstance(v.type, TensorType)
        if v.type.dtype != ty.dtype or v.type.device != ty.device:
            to = TensorType(ty.dtype, v.type.shape, v.type.stride, ty.device)
            (v,) = self.emit(aten("_to_copy"), (v,), (to,), (("dtype", ty.dtype), ("device", ty.device)))
            assert isinstance(v.type, TensorType)
        vt = v.type
        assert isinstance(vt, TensorType)
        shape, strides = vt.shape, vt.stride
        if shape != ty.shape:
            lead = len(ty.shape) - len(shape)
            stride = tuple(0 if i < lead or shape[i - lead] != s else strides[i - lead] for i, s in enumerate(ty.shape))
            (v,) = self.emit(aten("expand"), (v, list(ty.shape)), (TensorType(ty.dtype, ty.shape, stride, ty.device),))
        return v

    def twin(self, t: Tensor) -> FakeTensor:
        """The fake tensor that stands for ``t``."""
        if isinstance(t, FakeTensor):
            return t
        literal = self.literals.get(id(t))
        if literal is not None:
            return literal
        if id(t) not in self.handles:
            self.external(t)
        return self.fake_of(t)

    # ---- differentiability

    def tracks(self, args: object, kwargs: object) -> bool:
        """Whether autograd would track an operator with these arguments."""
        if not torch.is_grad_enabled():
            return False
        found = False

        def look(t: Tensor) -> None:
            nonlocal found
            found = found or self.carries(t, self.handle(t))

        each_tensor(args, look)
        each_tensor(kwargs, look)
        return found

    def operands(self, args: Any, kwargs: Any) -> tuple[Any, Any, bool]:
        """Values read by an operator, keyword values, and whether it is tracked."""
        tracking = self.tracks(args, kwargs)
        a = map_tensors(args, lambda t: self.read(t, tracking))
        kw = tuple((k, map_tensors(v, lambda t: self.read(t, tracking))) for k, v in kwargs.items())
        return a, kw, tracking

    def cut_at(self, args: Any, kwargs: Any) -> Loc | None:
        """Where the derivative of an untracked operator's inputs was cut: there if before, else here."""
        here: Loc | None = self.locate()[0]
        found: list[Loc] = []

        def look(t: Tensor) -> None:
            h = self.handle(t)
            if not self.carries(t, h) and h.origin is not None and self.value(h).mask:
                found.append(h.origin)

        each_tensor(args, look)
        each_tensor(kwargs, look)
        return found[0] if found else here

    def softens(self, args: object, kwargs: object) -> bool:
        """Whether a result carries on the derivative of an inner gradient taken without create_graph."""
        if not torch.is_grad_enabled() or not self.stops:
            return False
        found = False

        def look(t: Tensor) -> None:
            nonlocal found
            found = found or self.handle(t).soft

        each_tensor(args, look)
        each_tensor(kwargs, look)
        return found
