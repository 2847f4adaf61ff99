"""Building regions: equations are emitted in order, equal pure ones once (hash-consing), trivial ones not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mlc.ir.core import Alias, Arg, Eqn, Index, Loop, Op, Pack, Primitive, Region, Var, aten, flat_vars, map_vars
from mlc.ir.keys import call_key
from mlc.ir.origin import Origin
from mlc.ir.types import Loc, SeqType, TensorType, Type

__all__ = ["Builder", "dce", "renamed"]

_ZEROS = aten("zeros")
_FULL = aten("full")
_ZERO_OPS = {aten("zeros"), aten("zeros_like"), aten("new_zeros")}
_ONE_OPS = {aten("ones"), aten("ones_like")}
_ADD, _SUB, _MUL, _DIV = aten("add", "Tensor"), aten("sub", "Tensor"), aten("mul", "Tensor"), aten("div", "Tensor")
_LINEAR = {
    aten(n, o)
    for n, o in [
        ("view", "default"), ("_unsafe_view", "default"), ("reshape", "default"), ("expand", "default"),
        ("permute", "default"), ("transpose", "int"), ("t", "default"), ("unsqueeze", "default"),
        ("squeeze", "default"), ("squeeze", "dim"), ("squeeze", "dims"), ("select", "int"), ("slice", "Tensor"),
        ("neg", "default"), ("sum", "default"), ("sum", "dim_IntList"), ("_to_copy", "default"),
        ("clone", "default"), ("detach", "default"), ("alias", "default"), ("select_backward", "default"),
        ("slice_backward", "default"), ("expand_copy", "default"), ("_reshape_alias", "default"),
        ("sigmoid_backward", "default"), ("tanh_backward", "default"), ("threshold_backward", "default"),
        ("silu_backward", "default"), ("gelu_backward", "default"),
    ]
}  # fmt: skip
# Linear in each of their first two arguments. (PyTorch's formulas of tangents fill in zeros where there is none.)
_BILINEAR = {_MUL, *(aten(n) for n in ("mm", "bmm", "mv", "dot"))}
_CONVOLUTION, _CONVOLUTION_BACKWARD = aten("convolution"), aten("convolution_backward")


def _itself(v: Var) -> Var:
    return v


class Builder:
    """Collects equations.

    Args:
        merge: Whether equal pure equations become one.
        policy: What differentiation may do here (see :mod:`mlc.passes.autodiff.adjoint`); carried, not used.
    """

    def __init__(self, *, merge: bool = True, policy: Any = None) -> None:
        self.policy = policy
        self.inputs: list[Var] = []
        self.names: list[str] = []
        self.eqns: list[Eqn] = []
        self.position: dict[Var, int] = {}
        self._known: dict[Any, tuple[Var, ...]] = {}
        self._merge = merge
        self.zeros: set[Var] = set()
        self._ones: set[Var] = set()
        self._producer: dict[Var, Eqn] = {}

    def input(self, type: Type, name: str = "") -> Var:
        """A new region input."""
        v = Var(type)
        self.inputs.append(v)
        self.names.append(name)
        self.position[v] = -1
        return v

    def producer(self, v: Var) -> Eqn | None:
        """The equation that defines ``v``; None for an input."""
        return self._producer.get(v)

    def emit(
        self, op: Op, args: tuple[Arg, ...], types: Sequence[Type], kwargs: tuple[tuple[str, Arg], ...] = (),
        loc: Loc | None = None, tag: str = "", site: Any = None, *, simplify: bool = True,
    ) -> tuple[Var, ...]:  # fmt: skip
        """Append an equation (or find it, or simplify it away) and return its results."""
        if simplify:
            short = self._simplify(op, args, types, kwargs)
            if short is not None:
                return short
        impure = isinstance(op, Primitive) and (op.impure or isinstance(op, Alias))
        if isinstance(op, Index):
            packed = self._producer.get(args[0])
            if packed is not None and isinstance(packed.op, Pack):
                return (packed.args[op.at],)
        key = None
        if self._merge and not impure:
            key = call_key(op, args, kwargs, _itself)
            found = self._known.get(key)
            if found is not None:
                return found
        outs = tuple([Var(t) for t in types])
        eqn = Eqn(op, args, outs, kwargs, loc, tag, site)
        where = len(self.eqns)
        self.eqns.append(eqn)
        for v in outs:
            self.position[v] = where
            self._producer[v] = eqn
        if key is not None:
            self._known[key] = outs
        if op in _ZERO_OPS or (op is _FULL and type(args[1]) in (int, float) and args[1] == 0):
            self.zeros.add(outs[0])
        elif op in _ONE_OPS or (op is _FULL and type(args[1]) in (int, float) and args[1] == 1):
            self._ones.add(outs[0])
        return outs

    def append(self, eqn: Eqn) -> None:
        """Append a finished equation as it is."""
        for v in eqn.outs:
            self.position[v] = len(self.eqns)
            self._producer[v] = eqn
        self.eqns.append(eqn)

    def replace(self, old: Eqn, new: Eqn) -> None:
        """Put ``new`` in the place of ``old``; its results include those of ``old``."""
        where = self.position[old.outs[0]]
        self.eqns[where] = new
        for v in new.outs:
            self.position[v] = where
            self._producer[v] = new

    def split(self, v: Var, op: Op, loc: Loc | None, tag: str) -> Var:
        """Let ``v`` be ``op`` of a new value, which its equation gives instead; what read ``v`` goes on doing so.

        O(equations recorded since).
        """
        e, where = self._producer[v], self.position[v]
        new = Var(v.type, v.mask)
        self.eqns[where] = made = e.with_(outs=tuple([new if o is v else o for o in e.outs]))
        self.eqns.insert(where + 1, Eqn(op, (new,), (v,), (), loc, tag, e.site))
        self._producer.update((o, made) for o in made.outs)
        self._producer[v] = self.eqns[where + 1]
        for i in range(where, len(self.eqns)):
            self.position.update((o, i) for o in self.eqns[i].outs)
        return new

    def current(self, e: Eqn) -> Eqn:
        """The equation that now stands for ``e`` (see :meth:`replace`)."""
        found = self._producer.get(e.outs[0]) if e.outs else None
        return e if found is None else found

    def _simplify(self, op: Op, args: tuple[Arg, ...], types: Sequence[Type], kwargs: tuple[tuple[str, Arg], ...],
                  ) -> tuple[Var, ...] | None:  # fmt: skip
        if op is _ADD or op is _SUB:
            a, b = args[0], args[1]
            if type(b) is Var and b in self.zeros and type(a) is Var and a.type == types[0]:
                return (a,)
            if op is _ADD and type(a) is Var and a in self.zeros and type(b) is Var and b.type == types[0]:
                return None if kwargs else (b,)  # alpha scales b
        elif op in _BILINEAR or (op is _CONVOLUTION and args[2] is None):
            if self._nought(args[0]) or self._nought(args[1]):
                return (self.zero(types[0]),)
        elif op is _CONVOLUTION_BACKWARD:
            g, x, w = (self._nought(a) for a in args[:3])  # those of the input, the weight and the bias
            if all(zero for zero, asked in zip((g or w, g or x, g), args[10], strict=True) if asked):
                return tuple([self.zero(t) for t in types])
        elif (op is _DIV or op in _LINEAR) and type(args[0]) is Var and args[0] in self.zeros:
            return (self.zero(types[0]),)
        return None

    def _nought(self, a: Arg) -> bool:
        return a in self.zeros if type(a) is Var else type(a) in (int, float) and a == 0

    def zero(self, t: Type) -> Var:
        """A tensor of zeros with the dtype, shape and device of ``t``."""
        assert isinstance(t, TensorType)
        kw = (("dtype", t.dtype), ("device", t.device), ("pin_memory", False))
        out = TensorType(t.dtype, t.shape, contiguous(t.shape), t.device)
        return self.emit(_ZEROS, (list(t.shape),), (out,), kw)[0]

    def one(self, t: Type) -> Var:
        """A tensor of ones with the dtype, shape and device of ``t``."""
        assert isinstance(t, TensorType)
        kw = (("dtype", t.dtype), ("device", t.device), ("pin_memory", False))
        out = TensorType(t.dtype, t.shape, contiguous(t.shape), t.device)
        return self.emit(aten("ones"), (list(t.shape),), (out,), kw)[0]

    def add(self, a: Var | None, b: Var) -> Var:
        """Sum of two values of one shape, of sequences element by element; ``a`` may be None for nothing yet."""
        if a is None or a in self.zeros:
            return b
        if b in self.zeros:
            return a
        ta, tb = a.type, b.type
        if isinstance(ta, SeqType):
            inner = Builder()
            body = inner.region([inner.add(inner.input(ta.elem), inner.input(ta.elem))])
            return self.emit(Loop(body, 0, 0, ta.length, label="add"), (a, b), (ta,))[0]
        assert isinstance(ta, TensorType) and isinstance(tb, TensorType)
        stride = ta.stride if ta.stride == tb.stride and 0 not in ta.stride else contiguous(ta.shape)
        dtype = torch.promote_types(ta.dtype, tb.dtype)
        return self.emit(_ADD, (a, b), (TensorType(dtype, ta.shape, stride, ta.device),), tag=Origin.SUM)[0]

    def copy_eqn(self, e: Eqn, env: dict[Var, Var], *, tag: str | None = None) -> tuple[Var, ...]:
        """Emit ``e`` with its inputs looked up in ``env``; enters the results into ``env``."""
        args = map_vars(e.args, env.__getitem__)
        kwargs = tuple([(k, map_vars(v, env.__getitem__)) for k, v in e.kwargs])
        types = [v.type for v in e.outs]
        outs = self.emit(e.op, args, types, kwargs, e.loc, e.tag if tag is None else tag, simplify=False)
        env.update(zip(e.outs, outs, strict=True))
        return outs

    def inline(self, r: Region, args: Sequence[Var], *, tag: str | None = None, loc: Loc | None = None,
               ) -> tuple[Var, ...]:  # fmt: skip
        """Emit the equations of ``r`` applied to ``args`` (simplifying) and return its outputs."""
        env = dict(zip(r.inputs, args, strict=True))
        for e in r.eqns:
            a = map_vars(e.args, env.__getitem__)
            kw = tuple([(k, map_vars(v, env.__getitem__)) for k, v in e.kwargs])
            outs = self.emit(e.op, a, [v.type for v in e.outs], kw, loc or e.loc, e.tag if tag is None else tag)
            env.update(zip(e.outs, outs, strict=True))
        return tuple([env[v] for v in r.outputs])

    def region(self, outputs: Sequence[Var]) -> Region:
        """The region built so far, dead equations removed (inputs are all kept)."""
        return dce(Region(tuple(self.inputs), tuple(self.eqns), tuple(outputs), tuple(self.names)))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape."""
    out: list[int] = []
    n = 1
    for s in reversed(shape):
        out.append(n)
        n *= max(s, 1)
    return tuple(reversed(out))


def contiguous_type(t: Type) -> Type:
    """The type with contiguous strides."""
    return TensorType(t.dtype, t.shape, contiguous(t.shape), t.device) if isinstance(t, TensorType) else t


def renamed(e: Eqn, env: dict[Var, Var]) -> Eqn:
    """The equation reading other values where ``env`` has them."""
    if not any(v in env for v in e.inputs):
        return e
    args = map_vars(e.args, lambda v: env.get(v, v))
    return e.with_(args=args, kwargs=tuple((k, map_vars(x, lambda v: env.get(v, v))) for k, x in e.kwargs))


def dce(r: Region) -> Region:
    """Remove equations whose results nobody needs; impure ones stay.  O(equations)."""
    live = set(r.outputs)
    kept: list[Eqn] = []
    for e in reversed(r.eqns):
        if e.impure or any(v in live for v in e.outs):
            kept.append(e)
            live.update(flat_vars(e.args, e.kwargs))
    if len(kept) == len(r.eqns):
        return r
    return Region(r.inputs, tuple(reversed(kept)), r.outputs, r.names)
