"""Recording eager PyTorch as functional equations.

A :class:`Recorder` is a ``TorchDispatchMode`` over fake tensors: every ATen call that reaches it becomes one
:class:`~mlc.ir.core.Eqn`.  Mutation and aliasing are resolved on the way.  Each storage has one current value;
each tensor is a storage and a chain of view operators; a write through a view becomes the functional scatter of
:mod:`mlc.ir.views`, and other views of the storage are re-derived when next read.

Differentiability belongs to edges: an operator that autograd tracks but that reads a local value which does not
require grad gets a ``stop`` there.  That is what ``detach`` and ``no_grad`` mean, and it ignores autograd's own
detaches.  Operators under ``no_grad`` carry no stop themselves: an in-place write to a leaf is an update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from mlc.errors import CaptureError
from mlc.ir import views
from mlc.ir.builder import Builder
from mlc.ir.core import Alias, Eqn, Random, Region, SafeSqrt, Stop, Var, aten, flat_vars
from mlc.ir.inplace import functional_variant, like_to_fill, schema_of
from mlc.ir.special import FILLED, SPECIAL, factory
from mlc.ir.trees import each_tensor, flatten, map_tensors, substitute
from mlc.ir.types import Loc, TensorType

__all__ = ["Handle", "Recorder", "Storage", "trace_region"]

_A: Any = torch.ops.aten


class Storage:
    """One memory of the recorded program: its current value and how often it was written."""

    __slots__ = ("external", "leaf", "var", "version")

    def __init__(self, var: Var, external: Any = None) -> None:
        self.var = var
        self.version = 0
        self.external = external
        self.leaf = False  # memory of a leaf that requires grad: each value it takes is one to differentiate by


class Handle:
    """One tensor: a storage seen through a chain of ``(op, args, kwargs, output index, types, loc)`` view steps."""

    __slots__ = ("cached", "chain", "copy", "hidden", "leaf", "origin", "soft", "storage", "taint", "version")

    def __init__(self, storage: Storage, chain: tuple[Any, ...] = (), origin: Loc | None = None) -> None:
        self.storage = storage
        self.chain = chain
        self.taint = False  # an inner gradient taken with create_graph: carries a derivative
        self.soft = False  # ... without: a constant for inner gradients, differentiated by the hypergradient
        self.leaf = False
        self.hidden = False  # a view made under no_grad: PyTorch's flag says it requires grad, but nothing flows
        self.copy = False  # made by copy.deepcopy
        self.origin = origin
        self.version = -1
        self.cached: Var | None = None


class Recorder(TorchDispatchMode):
    """Records what runs under it.  Subclasses say where code comes from and what unknown tensors are."""

    stops = False  # whether differentiation is cut where autograd would (programs; not rules)

    def __init__(self, *, merge: bool = False, fake_mode: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.fake_mode = fake_mode or FakeTensorMode(allow_non_fake_inputs=False)
        self.builder = Builder(merge=merge)
        self.handles: dict[int, tuple[Tensor, Handle]] = {}  # real tensors by identity
        self.literals: dict[int, FakeTensor] = {}
        self.tag = "forward"
        self.safe_sqrt = False
        self._bits = 0
        self._bit_of: dict[Var, int] = {}
        self.bit_var: list[Var] = []
        self._stops: dict[Any, Var] = {}
        self._views: dict[Any, tuple[Var, ...]] = {}
        self.stop_log: list[Eqn] = []

    def active(self) -> Any:
        """Context in which operators are recorded, whether or not they are already."""
        return contextlib.nullcontext() if _get_current_dispatch_mode() is self else self

    # ---- what subclasses decide

    def locate(self) -> tuple[Loc | None, Any]:
        """The user's place now, and the loop iterations it is in."""
        return None, None

    def copying(self) -> bool:
        """Whether ``copy.deepcopy`` is running."""
        return False

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

    # ---- values of tensors

    def new_bit(self, v: Var) -> int:
        """Mark ``v`` as a differentiable leaf value of its own."""
        bit = self._bit_of.get(v)
        if bit is None:
            bit = 1 << self._bits
            self._bits += 1
            self._bit_of[v] = bit
            self.bit_var.append(v)
            v.mask |= bit
        return bit

    def handle(self, t: Tensor) -> Handle:
        """The handle of any tensor."""
        if type(t) is FakeTensor or isinstance(t, FakeTensor):
            h = getattr(t, "_mlc", None)
            if h is None:
                raise CaptureError(
                    "a tensor appeared that mlc did not see being made", loc=self.locate()[0],
                    advice="create tensors inside the compiled function with ordinary torch calls",
                )  # fmt: skip
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
                    outs = self._emit(op, (var, *args), types, kwargs, loc=loc)
                    self._views[key] = outs
                var = outs[index]
            h.cached, h.version = var, s.version
        return h.cached

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
                    var = self._stop(var, h)
                    self._own(h, var)
                h.storage.leaf = h.storage.leaf or not h.chain
            self.new_bit(var)
        elif tracking and var.mask and not self.carries(t, h) and t.dtype.is_floating_point | t.dtype.is_complex:
            return self._stop(var, h, inner=h.soft)
        return var

    def _own(self, h: Handle, var: Var) -> None:
        """Give a new leaf a memory of its own when it shared one, else make ``var`` its value."""
        if h.chain:
            h.storage, h.chain = Storage(var), ()
        else:
            h.storage.var = var

    def _stop(self, var: Var, h: Handle, *, inner: bool = False) -> Var:
        key = (self.scope(), var, inner)
        known = self._stops.get(key)
        if known is None:
            known = Var(var.type)
            loc, site = self.locate()
            tag = "copy" if h.copy else self.tag
            eqn = Eqn(Stop(inner), (var,), (known,), (), h.origin or loc, tag, site)
            known.mask = var.mask if inner else 0
            self.builder.append(eqn)
            self.stop_log.append(eqn)
            self._stops[key] = known
        return known

    def _emit(self, op: Any, args: Any, types: Sequence[Any], kwargs: Any = (), loc: Loc | None = None) -> Any:
        here, site = self.locate()
        b = self.builder
        n = len(b.eqns)
        outs = b.emit(op, args, types, tuple(kwargs), loc or here, self.tag, simplify=b._merge)
        if len(b.eqns) > n:
            if site is not None:
                b.eqns[-1] = b.eqns[-1].with_(site=site)
            mask = 0
            for v in flat_vars(args, tuple(kwargs)):
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
        with torch.utils._python_dispatch._disable_current_modes(), self.fake_mode:
            f = torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device=t.device)
        assert isinstance(f, FakeTensor)
        return self.wrap(f, var, taint=taint, origin=self.locate()[0])

    def write(self, t: Tensor, new: Var) -> None:
        """The tensor ``t`` now holds ``new``; its storage and the storage's other views follow."""
        h = self.handle(t)
        ty = TensorType.of(self.twin(t))
        new = self._fit(new, ty)
        steps: list[Var] = [h.storage.var]
        for op, args, kwargs, index, types, loc in h.chain[:-1]:
            base = steps[-1]
            steps.append(base if op in views.IDENTITY_VIEWS else self._emit(op, (base, *args), types, kwargs, loc)[index])
        for (op, args, _, index, _, _), base in zip(reversed(h.chain), reversed(steps), strict=False):
            new = self._through(op, args, index, base, new)
        h.storage.var = new
        h.storage.version += 1
        self.wrote(h)

    def wrote(self, h: Handle) -> None:
        """A storage changed (subclasses watch the user's memories)."""

    def _through(self, op: Any, args: Any, index: int, base: Var, new: Var) -> Var:
        if op in views.IDENTITY_VIEWS:
            return new
        region = write_region(op, args, index, base.type, new.type)
        if region is None:
            raise CaptureError(
                f"an in-place write through a view made by {op} cannot be expressed as a function",
                loc=self.locate()[0], advice="write the result to a new tensor instead of in place",
            )  # fmt: skip
        env = dict(zip(region.inputs, (base, new), strict=True))
        for e in region.eqns:
            a = tuple(substitute(x, env) for x in e.args)
            env.update(zip(e.outs, self._emit(e.op, a, [v.type for v in e.outs], e.kwargs), strict=True))
        return env[region.outputs[0]]

    def _fit(self, v: Var, ty: TensorType) -> Var:
        """Cast and broadcast as an in-place write does."""
        assert isinstance(v.type, TensorType)
        if v.type.dtype != ty.dtype or v.type.device != ty.device:
            to = TensorType(ty.dtype, v.type.shape, v.type.stride, ty.device)
            (v,) = self._emit(aten("_to_copy"), (v,), (to,), (("dtype", ty.dtype), ("device", ty.device)))
            assert isinstance(v.type, TensorType)
        if v.type.shape != ty.shape:
            lead = len(ty.shape) - len(v.type.shape)
            stride = tuple(
                0 if i < lead or v.type.shape[i - lead] != s else v.type.stride[i - lead] for i, s in enumerate(ty.shape)
            )
            (v,) = self._emit(aten("expand"), (v, list(ty.shape)), (TensorType(ty.dtype, ty.shape, stride, ty.device),))
        return v

    # ---- dispatch

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        s = schema_of(func)
        if s.prim:
            return func(*map_tensors(args, self.twin), **kwargs)
        if func is _A._local_scalar_dense.default or func is _A.is_nonzero.default:
            return self.scalar(args[0])
        special = SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        if s.foreach:
            return self._foreach(func, s.name, args, kwargs)
        fargs, fkwargs = map_tensors(args, self.twin), map_tensors(kwargs, self.twin)
        with self.fake_mode:
            try:
                out = func(*fargs, **fkwargs)
            except (DynamicOutputShapeException, DataDependentOutputException) as e:
                raise CaptureError(
                    f"the result of {func} has a size that depends on data", loc=self.locate()[0],
                    advice="use torch.where or multiply by the mask instead of indexing with it",
                ) from e  # fmt: skip
        if s.view and not s.random:
            return self._view(func, args, kwargs, out)
        if s.inplace_view:
            return self._inplace_view(func, args, kwargs)
        if s.inplace:
            return self._inplace(func, s, args, kwargs)
        if s.out:
            return self._out(func, s, args, kwargs)
        if s.hidden:
            raise CaptureError(f"{func} writes its arguments in a way mlc cannot follow", loc=self.locate()[0])
        return self._plain(func, s, args, kwargs, out)

    def scalar(self, t: Tensor) -> Any:
        """A Python number read from a tensor."""
        raise CaptureError("a Python number is read from a tensor", loc=self.locate()[0])

    def tracks(self, args: Any, kwargs: Any) -> bool:
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

    def softens(self, args: Any, kwargs: Any) -> bool:
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

    def _plain(self, func: Any, s: Any, args: Any, kwargs: Any, out: Any) -> Any:
        a, kw, tracking = self.operands(args, kwargs)
        flat = [out] if isinstance(out, Tensor) else [t for t in flatten(out) if isinstance(t, Tensor)]
        if not flat:
            return out
        types = [TensorType.of(t) for t in flat]
        if s.random:
            return self._random(func, a, kw, out, flat, types)
        if func is _A.sqrt.default and self.safe_sqrt:
            func = SafeSqrt()
        if func in FILLED:
            func, a, kw = factory(func, a, kw, types[0])
        vars_ = self._emit(func, a, types, kw)
        origin = None if tracking or not self.stops else self.cut_at(args, kwargs)
        soft = not tracking and self.softens(args, kwargs)
        for t, v in zip(flat, vars_, strict=True):
            self.wrap(t, v, taint=tracking and v.type.is_float, origin=origin)  # type: ignore[arg-type]
            if soft:
                self.handle(t).soft = v.type.is_float
        return out

    def _random(self, func: Any, a: Any, kw: Any, out: Any, flat: Any, types: Any) -> Any:
        fill = like_to_fill(func, a)
        if fill is not None:
            vars_ = self._fill(fill[0], types[0], fill[1], ())
        else:
            vars_ = self._emit(Random(func), a, types, kw)
        for t, v in zip(flat, vars_, strict=True):
            v.mask = 0
            self.wrap(t, v, origin=self.locate()[0])
        return out

    def _fill(self, op: Any, ty: TensorType, args: Any, kwargs: Any) -> tuple[Var, ...]:
        layout = (ty.shape, ty.stride, ty.dtype, ty.device)
        outs: tuple[Var, ...] = self._emit(Random(op, fill=True), (*layout, *args), (ty,), kwargs)
        outs[0].mask = 0
        return outs

    def _view(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        base = self.handle(args[0]) if isinstance(args[0], Tensor) else None
        assert base is not None
        if self.stops and args[0].requires_grad and args[0].is_leaf and not base.leaf:
            self.read(args[0], False)
            base = self.handle(args[0])
        loc = self.locate()[0]
        flat = [out] if isinstance(out, Tensor) else list(out)
        types = [TensorType.of(t) for t in flat]
        detaches = func is _A.detach.default
        kw = tuple(kwargs.items())
        for i, t in enumerate(flat):
            h = Handle(base.storage, (*base.chain, (func, tuple(args[1:]), kw, i, types, loc)))
            h.taint = base.taint and not detaches and torch.is_grad_enabled()
            h.soft = base.soft and not detaches and torch.is_grad_enabled()
            h.copy = detaches and self.copying()
            h.hidden = not detaches and not torch.is_grad_enabled()
            h.origin = loc if detaches or not torch.is_grad_enabled() else base.origin
            t._mlc = h
        return out

    def _inplace_view(self, func: Any, args: Any, kwargs: Any) -> Any:
        t = args[0]
        if not isinstance(t, FakeTensor):
            raise CaptureError(f"{func} changes the shape of a tensor from outside", loc=self.locate()[0])
        h = self.handle(t)
        op = functional_variant(func)
        h.chain = (*h.chain, (op, tuple(args[1:]), tuple(kwargs.items()), 0, [TensorType.of(t)], self.locate()[0]))
        h.version = -1
        return t

    def _inplace(self, func: Any, s: Any, args: Any, kwargs: Any) -> Any:
        t = args[0]
        ty = TensorType.of(self.twin(t))
        h = self.handle(t)
        taint, soft = self.tracks(args, kwargs), self.softens(args, kwargs)
        if s.random:
            a, kw, _ = self.operands(args[1:], kwargs)
            (new,) = self._fill(func, ty, a, kw)
        else:
            new = self._written(func, args, kwargs, ty)
        self.write(t, new)
        if torch.is_grad_enabled():
            h.taint, h.soft = h.taint or taint, h.soft or soft
        elif not h.taint:
            h.origin = self.locate()[0]
        return t

    def _written(self, func: Any, args: Any, kwargs: Any, ty: TensorType) -> Var:
        """The value that an in-place operator leaves in its first argument."""
        if func is _A.copy_.default:
            src = args[1]
            a, _, _ = self.operands((args[0], src) if torch.is_grad_enabled() else (src,), {})
            return self._emit(Alias(), (self._fit(a[-1], ty),), (ty,))[0]  # type: ignore[no-any-return]
        if func is _A.zero_.default or (func is _A.fill_.Scalar):
            value = 0 if func is _A.zero_.default else args[1]
            kw = (("dtype", ty.dtype), ("device", ty.device), ("pin_memory", False))
            return self._emit(aten("full"), (list(ty.shape), value), (ty,), kw)[0]  # type: ignore[no-any-return]
        if func is _A.fill_.Tensor:
            a, _, _ = self.operands((args[1],), {})
            return self._fit(a[0], ty)
        pure = functional_variant(func)
        if pure is None:
            raise CaptureError(
                f"{func} has no functional form", loc=self.locate()[0], advice="use an out-of-place operator"
            )
        a, kw, _ = self.operands(args, kwargs)
        out = self._pure_type(pure, args, kwargs)
        op = SafeSqrt() if pure is _A.sqrt.default and self.safe_sqrt else pure
        return self._emit(op, a, (out,), kw)[0]  # type: ignore[no-any-return]

    def _pure_type(self, pure: Any, args: Any, kwargs: Any) -> TensorType:
        with self.fake_mode:
            return TensorType.of(pure(*map_tensors(args, self.twin), **map_tensors(kwargs, self.twin)))

    def _out(self, func: Any, s: Any, args: Any, kwargs: Any) -> Any:
        pure = functional_variant(func)
        if pure is None:
            raise CaptureError(f"{func} has no functional form", loc=self.locate()[0])
        rest = {k: v for k, v in kwargs.items() if k not in s.out}
        with self.active():
            result = pure(*args, **rest)
        targets = [kwargs[k] for k in s.out]
        values = [result] if isinstance(result, Tensor) else list(result)
        for target, v in zip(targets, values, strict=True):
            self.write(target, self.value(self.handle(v)))
        return targets[0] if len(targets) == 1 else tuple(targets)

    def _foreach(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """``_foreach_x(lists)`` as one ``x`` per element."""
        base = name.removeprefix("aten::_foreach_")
        inplace = base.endswith("_")
        packet = getattr(_A, {"norm": "linalg_vector_norm"}.get(base.rstrip("_"), base.rstrip("_")))
        n = len(args[0])
        results = []
        with self.active():
            for i in range(n):
                one = [a[i] if isinstance(a, (list, tuple)) and len(a) == n else a for a in args]
                kw = {k: (v[i] if isinstance(v, (list, tuple)) and len(v) == n else v) for k, v in kwargs.items()}
                r = packet(*one, **kw)
                results.append(one[0].copy_(r) if inplace else r)
        return None if inplace else results


def trace_region(
    fn: Callable[..., Sequence[Tensor | None]], types: Sequence[TensorType], *, grad: Sequence[bool] | None = None,
    mode: FakeTensorMode | None = None,
) -> tuple[Region, tuple[bool, ...]]:  # fmt: skip
    """Record ``fn`` on fake tensors of the given types.

    Returns the region and, for each result of ``fn``, whether it was a tensor (None results have no output).
    ``grad[i]`` makes argument i require grad.
    """
    rec = Recorder(merge=True, fake_mode=mode)
    args = []
    for i, t in enumerate(types):
        f = rec.fresh(rec.builder.input(t))
        if grad is not None and grad[i]:
            f.requires_grad_(True)
        rec.handle(f).leaf = True
        args.append(f)
    with rec:
        outs = fn(*args)
        present = tuple(o is not None for o in outs)
        vars_ = [rec.value(rec.handle(o)) for o in outs if o is not None]
    return rec.builder.region(vars_), present


_WRITE_REGIONS: dict[Any, Region | None] = {}


def write_region(op: Any, args: Any, index: int, base: Any, new: Any) -> Region | None:
    """``(base, new view) -> new base`` as a region, recorded once per signature."""
    key = (op, repr(args), index, base, new)
    if key not in _WRITE_REGIONS:
        found = True

        def run(b: Tensor, n: Tensor) -> list[Tensor | None]:
            nonlocal found
            out = views.write_through(op, args, b, n, index)
            found = out is not None
            return [b.clone() if out is None else out]

        region, _ = trace_region(run, (base, new))
        _WRITE_REGIONS[key] = region if found else None
    return _WRITE_REGIONS[key]
