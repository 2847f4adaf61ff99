"""Recording eager PyTorch as functional equations.

A :class:`Recorder` is a ``TorchDispatchMode`` over fake tensors: every ATen call that reaches it becomes one
:class:`~mlc.ir.core.Eqn`.  Mutation and aliasing are resolved on the way.  Each storage has one current value;
each tensor is a storage and a chain of view operators; a write through a view becomes the functional scatter of
:mod:`mlc.record.views`, and other views of the storage are re-derived when next read.

Differentiability belongs to edges: an operator that autograd tracks but that reads a local value which does not
require grad gets a ``stop`` there.  That is what ``detach`` and ``no_grad`` mean, and it ignores autograd's own
detaches.  Operators under ``no_grad`` carry no stop themselves: an in-place write to a leaf is an update.
"""

from __future__ import annotations

import contextlib
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
from mlc.ir.core import Alias, Random, Region, SafeSqrt, Var, aten
from mlc.ir.inplace import Schema, functional_variant, like_to_fill, schema_of
from mlc.ir.trees import flatten, map_tensors
from mlc.ir.types import TensorType
from mlc.record.fakes import Result, try_types
from mlc.record.handles import Handle, Storage
from mlc.record.regions import write_region
from mlc.record.special import FILLED, SPECIAL, factory
from mlc.record.values import Values

__all__ = ["Handle", "Recorder", "Storage"]

_A: Any = torch.ops.aten
_DEVICE: Any = torch.ops.prim.device.default
_WRITES = (_A.copy_.default, _A.zero_.default, _A.fill_.Scalar, _A.fill_.Tensor)
_KINDS: dict[int, tuple[Any, Schema, Any]] = {}  # by identity: an operator's own hash is slow


def _kind(func: object) -> tuple[Any, Schema, Any]:
    """The operator (so that it stays), its schema, and its special treatment if it has one."""
    found = _KINDS[id(func)] = (func, schema_of(func), SPECIAL.get(func))
    return found


class Recorder(Values, TorchDispatchMode):
    """Records what runs under it."""

    def __init__(self, *, merge: bool = False, fake_mode: FakeTensorMode | None = None) -> None:
        TorchDispatchMode.__init__(self)
        Values.__init__(self, merge=merge, fake_mode=fake_mode)
        self.safe_sqrt = False
        self._results: dict[Any, tuple[bool, list[Result]]] = {}
        self._pure: dict[Any, TensorType | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether every call is to be wrapped against compilation: nothing compiles while recording."""
        return False

    def active(self) -> Any:
        """Context in which operators are recorded, whether or not they are already."""
        return contextlib.nullcontext() if _get_current_dispatch_mode() is self else self

    # ---- dispatch

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kind = _KINDS.get(id(func)) or _kind(func)
        s = kind[1]
        if s.prim:
            if func is _DEVICE:
                return self.twin(args[0]).fake_device
            return func(*map_tensors(args, self.twin), **(kwargs or {}))
        return self.dispatch(func, s, kind[2], args, kwargs or {})

    def dispatch(self, func: Any, s: Schema, special: Any, args: Any, kwargs: Any) -> Any:
        """Record one operator."""
        if func is _A._local_scalar_dense.default or func is _A.is_nonzero.default:
            return self.scalar(args[0])
        if special is not None:
            return special(self, func, args, kwargs)
        if s.foreach:
            return self._foreach(func, s.name, args, kwargs)
        if s.inplace_view:
            return self._inplace_view(func, args, kwargs)
        if s.out:
            self._fake_run(func, args, kwargs)
            return self._out(func, s, args, kwargs)
        if s.hidden:
            raise CaptureError(f"{func} writes its arguments in a way mlc cannot follow", loc=self.locate()[0])
        if s.inplace:
            return self._inplace(func, s, args, kwargs)
        out = self._result(func, s, args, kwargs)
        if s.view and not s.random:
            return self._view(func, args, kwargs, out)
        return self.recorded(func, s, args, kwargs, out)

    def _result(self, func: object, s: Schema, args: Any, kwargs: object) -> Any:
        """Fake results of an operator, from what it gave before for arguments of the same types."""
        base = self.twin(args[0]) if s.view and not s.random else None
        at = None if base is None else base.storage_offset()
        key = (id(func), at, self._signature(args), self._signature(kwargs) if kwargs else None)
        known = self._results.get(key)
        if known is not None:
            return self.fakes.again(known, base)
        out = self._fake_run(func, args, kwargs)
        if func is not _A.as_strided.default:  # it may leave the extent of its argument
            known = self.fakes.results(out, base)
            if known is not None:
                self._results[key] = known
        return out

    def _signature(self, a: object) -> Any:
        """Arguments with numbers of types in place of tensors, hashable."""
        t = type(a)
        if t is int or t is bool or t is float:
            return (t, a)
        if isinstance(a, Tensor):
            return self.fakes.number(self.twin(a))
        if isinstance(a, (list, tuple)):
            return (tuple, *[self._signature(x) for x in a])
        if isinstance(a, dict):
            return tuple([(k, self._signature(v)) for k, v in a.items()])
        return (t, a)

    def _fake_run(self, func: Any, args: Any, kwargs: object) -> Any:
        fargs, fkwargs = map_tensors(args, self.twin), map_tensors(kwargs, self.twin)
        with self.fake_mode:
            try:
                out = func(*fargs, **fkwargs)
            except (DynamicOutputShapeException, DataDependentOutputException) as e:
                raise CaptureError(
                    f"the result of {func} has a size that depends on data",
                    loc=self.locate()[0],
                    advice="use torch.where or multiply by the mask instead of indexing with it",
                ) from e
        if torch.Tag.nondeterministic_seeded not in func.tags:
            try_types(func, fargs, fkwargs)
        return out

    def plain(self, func: Any, args: Any, kwargs: object) -> Any:
        """Record an operator as it stands, whatever is special about it."""
        with torch.utils._python_dispatch._disable_current_modes(), self.fake_mode:
            out = func(*map_tensors(args, self.twin), **map_tensors(kwargs, self.twin))
        return self.recorded(func, schema_of(func), args, kwargs, out)

    def wrote(self, h: Handle) -> None:
        """A storage changed: nobody watches."""

    def write_region(self, op: object, args: object, index: int, base: object, new: object) -> Region | None:
        """See :func:`mlc.record.regions.write_region`."""
        return write_region(lambda: Recorder(merge=True), op, args, index, base, new)

    def recorded(self, func: object, s: Any, args: Any, kwargs: object, out: Any) -> Any:
        """Enter an operator that gave ``out`` as an equation; ``out``, with a value."""
        a, kw, tracking = self.operands(args, kwargs)
        flat = [out] if isinstance(out, Tensor) else [t for t in flatten(out) if isinstance(t, Tensor)]
        if not flat:
            return out
        types = [self.fakes.type(t) for t in flat]
        if s.random:
            return self._random(func, a, kw, out, flat, types)
        if func is _A.sqrt.default and self.safe_sqrt:
            func = SafeSqrt()
        if func in FILLED:
            func, a, kw = factory(func, a, kw, types[0])
        vars_ = self.emit(func, a, types, kw)
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
            vars_ = self.emit(Random(func), a, types, kw)
        for t, v in zip(flat, vars_, strict=True):
            v.mask = 0
            self.wrap(t, v, origin=self.locate()[0])
        return out

    def _fill(self, op: Any, ty: TensorType, args: Any, kwargs: object) -> tuple[Var, ...]:
        layout = (ty.shape, ty.stride, ty.dtype, ty.device)
        outs: tuple[Var, ...] = self.emit(Random(op, fill=True), (*layout, *args), (ty,), kwargs)
        outs[0].mask = 0
        return outs

    def _view(self, func: object, args: Any, kwargs: Any, out: Any) -> Any:
        base = self.handle(args[0]) if isinstance(args[0], Tensor) else None
        assert base is not None
        if self.stops and args[0].requires_grad and args[0].is_leaf and not base.leaf:
            self.read(args[0], False)
            base = self.handle(args[0])
        loc = self.locate()[0]
        flat = [out] if isinstance(out, Tensor) else list(out)
        types = [self.fakes.type(t) for t in flat]
        detaches = func is _A.detach.default
        kw = tuple(kwargs.items())
        for i, t in enumerate(flat):
            h = Handle(base.storage, (*base.chain, (func, tuple(args[1:]), kw, i, types, loc)))
            h.taint = base.taint and not detaches and torch.is_grad_enabled()
            h.soft = base.soft and not detaches and torch.is_grad_enabled()
            h.copy = detaches and self.copying()
            h.hidden = not detaches and not torch.is_grad_enabled()
            h.origin = loc if detaches or not torch.is_grad_enabled() else base.origin
            t._mlc = h  # type: ignore[union-attr]
        return out

    def _inplace_view(self, func: object, args: Any, kwargs: Any) -> Any:
        t = args[0]
        if not isinstance(t, FakeTensor):
            raise CaptureError(f"{func} changes the shape of a tensor from outside", loc=self.locate()[0])
        self._fake_run(func, args, kwargs)
        self.fakes.forget(t)
        h = self.handle(t)
        op = functional_variant(func)
        h.chain = (*h.chain, (op, tuple(args[1:]), tuple(kwargs.items()), 0, [TensorType.of(t)], self.locate()[0]))
        h.version = -1
        return t

    def _inplace(self, func: object, s: Schema, args: Any, kwargs: object) -> Any:
        t = args[0]
        pure = self._pure_type(func, s, args, kwargs)
        ty = self.fakes.type(self.twin(t))
        h = self.handle(t)
        taint, soft = self.tracks(args, kwargs), self.softens(args, kwargs)
        if s.random:
            a, kw, _ = self.operands(args[1:], kwargs)
            (new,) = self._fill(func, ty, a, kw)
        else:
            new = self._written(func, args, kwargs, ty, pure)
        self.write(t, new)
        if torch.is_grad_enabled():
            h.taint, h.soft = h.taint or taint, h.soft or soft
        elif not h.taint:
            h.origin = self.locate()[0]
        return t

    def _written(self, func: object, args: Any, kwargs: object, ty: TensorType, out: TensorType | None) -> Var:
        """The value that an in-place operator leaves in its first argument."""
        if func is _A.copy_.default:
            src = args[1]
            a, _, _ = self.operands((args[0], src) if torch.is_grad_enabled() else (src,), {})
            return self.emit(Alias(), (self.fitted(a[-1], ty),), (ty,))[0]  # type: ignore[no-any-return]
        if func is _A.zero_.default or (func is _A.fill_.Scalar):
            value = 0 if func is _A.zero_.default else args[1]
            kw = (("dtype", ty.dtype), ("device", ty.device), ("pin_memory", False))
            return self.emit(aten("full"), (list(ty.shape), value), (ty,), kw)[0]  # type: ignore[no-any-return]
        if func is _A.fill_.Tensor:
            a, _, _ = self.operands((args[1],), {})
            return self.fitted(a[0], ty)
        pure = functional_variant(func)
        if pure is None:
            raise CaptureError(
                f"{func} has no functional form", loc=self.locate()[0], advice="use an out-of-place operator"
            )
        a, kw, _ = self.operands(args, kwargs)
        assert out is not None
        op = SafeSqrt() if pure is _A.sqrt.default and self.safe_sqrt else pure
        return self.emit(op, a, (out,), kw)[0]  # type: ignore[no-any-return]

    def _pure_type(self, func: object, s: Schema, args: object, kwargs: object) -> TensorType | None:
        """Type of the value that an in-place operator computes, before it is cast to the type of its target.

        The operator itself runs too, once per signature: it may refuse its arguments.
        """
        key = (id(func), self._signature(args), self._signature(kwargs))
        if key not in self._pure:
            self._fake_run(func, args, kwargs)
            pure = functional_variant(func)
            self._pure[key] = None
            if not s.random and pure is not None and func not in _WRITES:
                self._pure[key] = self.fakes.type(self._fake_run(pure, args, kwargs))
        return self._pure[key]

    def _out(self, func: object, s: Any, args: Any, kwargs: Any) -> Any:
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

    def _foreach(self, func: object, name: str, args: Any, kwargs: Any) -> Any:
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
