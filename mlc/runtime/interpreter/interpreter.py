"""The interpreter: a region becomes straight Python that drops every value at its last use.

Each equation is one line of generated source, so the overhead per operator is that of a Python call.  Arguments
arrive in a list that is emptied, so that nobody else keeps them alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from mlc.ir.core import Alias, Custom, Eqn, Feed, Index, Loop, Pack, Random, Region, SafeSqrt, Stop, Var, aten
from mlc.ir.lowered.reuse import into, reused
from mlc.ir.types import TensorType

__all__ = ["Executable", "compile_region"]

Executable = Callable[[list[Any]], list[Any]]
Look = Callable[[Eqn, Sequence[Any], Sequence[Any]], None]
_A: Any = torch.ops.aten


class _Writer:
    """Generates the source of one region."""

    def __init__(self, region: Region, special: Callable[[Eqn], Callable[..., Any] | None], look: Look | None) -> None:
        self.region = region
        self.special = special
        self.look = look
        self.names: dict[Var, str] = {}
        self.consts: dict[str, Any] = {"flat": _masked}
        self._const_names: dict[Any, str] = {}
        self.lines: list[str] = []

    def name(self, v: Var) -> str:
        n = self.names.get(v)
        if n is None:
            n = self.names[v] = f"v{len(self.names)}"
        return n

    def const(self, value: Any) -> str:
        key = id(value)
        n = self._const_names.get(key)
        if n is None:
            n = self._const_names[key] = f"c{len(self.consts)}"
            self.consts[n] = value
        return n

    def literal(self, a: Any) -> str:
        t = type(a)
        if t is Var:
            return self.name(a)
        if t is list:
            return "[" + ", ".join(self.literal(x) for x in a) + "]"
        if t is tuple:
            return "(" + "".join(self.literal(x) + ", " for x in a) + ")"
        if a is None or t is bool or t is int or t is str:
            return repr(a)
        if t is float and a == a and a not in (float("inf"), float("-inf")):
            return repr(a)
        return self.const(a)

    def write(self) -> str:
        r = self.region
        last: dict[Var, int] = {}
        for i, e in enumerate(r.eqns):
            for v in e.inputs:
                last[v] = i
        for v in r.outputs:
            last[v] = len(r.eqns)
        ins = "".join(self.name(v) + ", " for v in r.inputs)
        self.lines = ["def region(args):", f"    {ins}= args" if ins else "    pass", "    args.clear()"]
        unused = [self.names[v] for v in r.inputs if v not in last]
        if unused:
            self.lines.append("    del " + ", ".join(unused))
        over = reused(r) if self.look is None else {}
        for i, e in enumerate(r.eqns):
            dying = list(dict.fromkeys(self.names[v] for v in e.inputs if last[v] == i))
            if self.look is not None:
                self._looked(e, dying)
            elif i in over:
                self._write_over(e, over[i], dying)
            else:
                self._eqn(e, dying)
            dead = [self.names[v] for v in e.outs if v not in last]
            if dead:
                self.lines.append("    del " + ", ".join(dead))
        self.lines.append("    return [" + ", ".join(self.name(v) for v in r.outputs) + "]")
        return "\n".join(self.lines)

    def _eqn(self, e: Eqn, dying: list[str]) -> None:
        op = e.op
        if isinstance(op, (Alias, Stop)):
            for o, a in zip(e.outs, e.args, strict=False):
                self.lines.append(f"    {self.name(o)} = {self.name(a)}")
        elif isinstance(op, Custom):
            raw = e.args[op.n_in : op.n_in + op.n_out]
            for o, a in zip(e.outs, raw, strict=True):
                self.lines.append(f"    {self.name(o)} = {self.name(a)}")
        elif isinstance(op, Pack):
            self.lines.append(f"    {self.name(e.outs[0])} = [" + ", ".join(self.literal(a) for a in e.args) + "]")
        elif isinstance(op, Index):
            self.lines.append(f"    {self.name(e.outs[0])} = {self.name(e.args[0])}[{op.at}]")
        elif isinstance(op, (Loop, Feed)) or self.special(e) is not None:
            fn = self.special(e)
            assert fn is not None, op
            self.lines.append("    a = [" + ", ".join(self.literal(a) for a in e.args) + "]")
            if dying:
                self.lines.append("    del " + ", ".join(dying))
            outs = "".join(self.name(v) + ", " for v in e.outs)
            self.lines.append(f"    {outs}= {self.const(fn)}(a)" if outs else f"    {self.const(fn)}(a)")
            return
        else:
            self._call(e)
        if dying:
            self.lines.append("    del " + ", ".join(dying))

    def _looked(self, e: Eqn, dying: list[str]) -> None:
        """The equation, and a look at what it read and made."""
        self._eqn(e, [])
        ins, outs = ("".join(self.name(v) + ", " for v in vs) for vs in (e.inputs, e.outs))
        self.lines.append(f"    {self.const(self.look)}({self.const(e)}, ({ins}), ({outs}))")
        if dying:
            self.lines.append("    del " + ", ".join(dying))

    def _write_over(self, e: Eqn, v: Var, dying: list[str]) -> None:
        """The result takes the place of a dying operand."""
        found = into(e, v)
        assert found is not None
        op, as_out = found
        args = ", ".join(self.literal(a) for a in e.args) + (f", out={self.name(v)}" if as_out else "")
        self.lines.append(f"    {self.name(e.outs[0])} = {self.const(op)}({args})")
        self.lines.append("    del " + ", ".join(dying))

    def _call(self, e: Eqn) -> None:
        fn = _callable(e)
        args = ", ".join(self.literal(a) for a in e.args)
        kw = "".join(f", {k}={self.literal(v)}" for k, v in e.kwargs)
        call = f"{self.const(fn)}({args}{kw if args else kw[2:]})"
        outs = [self.name(v) for v in e.outs]
        if len(outs) == 1 and not _returns_many(e.op) and not isinstance(e.op, Random):
            self.lines.append(f"    {outs[0]} = {call}")
        else:
            self.lines.append(f"    {''.join(o + ', ' for o in outs)}= flat({call}, {len(outs)})")


def _masked(result: Any, n: int) -> Any:
    """The ``n`` tensors of a result; one that an ``output_mask`` left out keeps its place (None) where it has one."""
    return result if type(result) is tuple and len(result) == n else _flat(result)


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    out: list[Tensor] = []
    for r in result:
        if isinstance(r, (list, tuple)):
            out.extend(_flat(r))
        elif isinstance(r, Tensor):
            out.append(r)
    return out


def _returns_many(op: Any) -> bool:
    return isinstance(op, OpOverload) and (
        len(op._schema.returns) > 1 or op._schema.returns[0].type.kind() == "ListType"
    )


def _as_strided(t: TensorType) -> Callable[..., Tensor]:
    """as_strided reads memory, so its input must lie as it did when the rule was recorded."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.stride() != t.stride or x.storage_offset() != 0:
            y = torch.empty_strided(t.shape, t.stride, dtype=x.dtype, device=x.device)
            y.copy_(x)
            x = y
        return torch.as_strided(x, *args, **kwargs)

    return run


def run_random(op: Random, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Execute a random operator exactly as PyTorch would have."""
    if not op.fill:
        return _flat(op.op(*args, **kwargs))
    size, stride, dtype, device, *rest = args
    if op.op is _A.native_dropout.default:
        ones = torch.empty_strided(size, stride, dtype=dtype, device=device).fill_(1)
        return [_A.native_dropout.default(ones, rest[0], True)[1]]
    t = torch.empty_strided(size, stride, dtype=dtype, device=device)
    op.op(t, *rest, **kwargs)
    return [t]


def _random(op: Random) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return run_random(op, args, kwargs)

    return run


_RESHAPES = {aten("view"), aten("_unsafe_view"), aten("_reshape_alias")}


def _reshape(x: Tensor, shape: Any, *_: Any) -> Tensor:
    return torch.reshape(x, shape)


def _callable(e: Eqn) -> Callable[..., Any]:
    op = e.op
    if op in _RESHAPES:
        return _reshape
    if isinstance(op, SafeSqrt):
        return torch.sqrt
    if isinstance(op, Random):
        return _random(op)
    if op is _A.as_strided.default:
        t = e.args[0].type
        assert isinstance(t, TensorType)
        return _as_strided(t)
    assert callable(op), op
    return op


def compile_region(
    region: Region, special: Callable[[Eqn], Callable[..., Any] | None], look: Look | None = None
) -> Executable:
    """Executable form of a region.

    Args:
        region: Its equations; inner gradients must have been lowered.
        special: Gives the callable ``list -> list`` for loops, feeds, draws and other runtime equations.
        look: Called behind every equation with its operands and results (which then live a little longer).
    """
    w = _Writer(region, special, look)
    source = w.write()
    scope = dict(w.consts)
    exec(compile(source, "<mlc region>", "exec"), scope)
    fn: Executable = scope["region"]
    return fn
