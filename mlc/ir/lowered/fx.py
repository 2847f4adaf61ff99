"""Regions as ``torch.fx.GraphModule``: ATen calls as they are, our primitives as the functions below.

Nodes carry ``meta["val"]`` (a fake tensor), ``meta["type"]``, ``meta["loc"]`` and ``meta["tag"]``. The
modules run: ``grad`` is ``torch.autograd.grad(create_graph=True)``, ``loop`` calls its body once per trip.
What draws (``feed``, ``random``, ``draw``) needs the runtime and says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from mlc.ir.core import (
    Alias,
    Custom,
    Eqn,
    Grad,
    Index,
    Loop,
    Pack,
    Primitive,
    Region,
    SafeSqrt,
    Stop,
    Var,
    map_vars,
)
from mlc.ir.opaque.call import Call
from mlc.ir.types import TensorType

__all__ = [
    "alias",
    "call",
    "custom",
    "effect",
    "flatten",
    "grad",
    "item",
    "loop",
    "pack",
    "region_to_fx",
    "safesqrt",
    "stop",
]


# ---- the primitives as functions


def stop(x: Tensor) -> Tensor:
    """The value of x without a derivative."""
    return x.detach()


def alias(x: Tensor) -> Tensor:
    """The value of x as a value of its own."""
    return x.view_as(x)


def safesqrt(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0."""
    return torch.where(x == 0, torch.zeros_like(x), torch.where(x == 0, torch.ones_like(x), x).sqrt())


def pack(*values: Any) -> list[Any]:
    """Values as a sequence."""
    return list(values)


def item(sequence: Sequence[Any], at: int) -> Any:
    """One element of a sequence."""
    return sequence[at]


def flatten(result: Any) -> list[Any]:
    """Tensors of a nested result, in order; what is None is left out."""
    if isinstance(result, list | tuple):
        return [x for r in result for x in flatten(r)]
    return [] if result is None else [result]


def grad(losses: Sequence[Tensor], wrt: Sequence[Tensor], seeds: Sequence[Tensor]) -> list[Tensor]:
    """Vector-Jacobian product of losses, differentiable again; zeros where nothing depends on a value."""
    found = torch.autograd.grad(losses, wrt, seeds, create_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wrt, found, strict=True)]


def loop(body: Callable[..., Any], args: Sequence[Any], n_carry: int, n_const: int, trips: int | None,
         reverse: bool) -> list[Any]:  # fmt: skip
    """The body once per trip: carries and constants, then an element of each sequence."""
    carry, const, seqs = list(args[:n_carry]), args[n_carry : n_carry + n_const], args[n_carry + n_const :]
    count = trips if trips is not None else min((len(s) for s in seqs), default=0)
    emitted: list[dict[int, Any]] | None = None
    for t in reversed(range(count)) if reverse else range(count):
        outs = body(*carry, *const, *[s[t] for s in seqs])
        carry = list(outs[:n_carry])
        emitted = emitted or [{} for _ in outs[n_carry:]]
        for j, x in enumerate(outs[n_carry:]):
            emitted[j][t] = x
    return [*carry, *[[e[t] for t in sorted(e)] for e in emitted or []]]


class _Custom(torch.autograd.Function):
    """Identity on recorded results, with the recorded backward as its rule."""

    @staticmethod
    def forward(ctx: Any, body: Any, n_in: int, n_out: int, present: Sequence[bool], *args: Any) -> Any:
        ctx.rule = (body, n_in, n_out, present)
        outs = tuple(x.clone() for x in args[n_in : n_in + n_out])
        ctx.save_for_backward(*args, *outs)
        return outs

    @staticmethod
    def backward(ctx: Any, *cts: Any) -> Any:
        body, n_in, n_out, present = ctx.rule
        saved = ctx.saved_tensors
        args, outs = saved[:-n_out], saved[-n_out:]
        found = iter(body(*args[:n_in], *outs, *args[n_in + n_out :], *cts))
        grads = [next(found) if has else None for has in present]
        return (None,) * 4 + tuple(grads) + (None,) * (len(args) - n_in)


def custom(body: Callable[..., Any], args: Sequence[Any], n_in: int, n_out: int, present: Sequence[bool]) -> Any:
    """A ``torch.autograd.Function`` of the user's."""
    return _Custom.apply(body, n_in, n_out, present, *args)  # type: ignore[no-untyped-call]


def call(callee: Callable[..., Any], args: Sequence[Any]) -> list[Any]:
    """A Python function of tensors, connected to PyTorch's graph."""
    found: list[Any] = callee.connected(args)  # type: ignore[attr-defined]
    return found


def effect(name: str, *args: Any, **kwargs: Any) -> Any:
    """A primitive that draws."""
    raise NotImplementedError(f"{name} belongs to the runtime: run the program, not its graph")


_FUNCTIONS: dict[type[Primitive], Callable[..., Any]] = {
    Stop: stop,
    Alias: alias,
    SafeSqrt: safesqrt,
    Pack: pack,
}


# ---- regions


def region_to_fx(region: Region, name: str = "Region") -> fx.GraphModule:
    """A region as a GraphModule; its outputs are a tuple."""
    return _Converter().convert(region, name)


class _Converter:
    def __init__(self) -> None:
        self.mode = FakeTensorMode()

    def convert(self, region: Region, name: str) -> fx.GraphModule:
        graph, root, env = fx.Graph(), nn.Module(), dict[Var, fx.Node]()
        names = region.names or ("",) * len(region.inputs)
        for i, (v, n) in enumerate(zip(region.inputs, names, strict=True)):
            env[v] = self.note(graph.placeholder(re.sub(r"\W+", "_", n).strip("_") or f"in{i}"), v, None)
        for e in region.eqns:
            self.eqn(graph, root, env, e)
        graph.output(tuple(env[v] for v in region.outputs))
        return fx.GraphModule(root, graph, name)

    def note(self, node: fx.Node, v: Var, e: Eqn | None) -> fx.Node:
        """Attach what is known of a value."""
        node.meta["type"] = v.type
        if isinstance(v.type, TensorType):
            with self.mode:
                t = v.type
                node.meta["val"] = torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device=t.device)
        self.place(node, e)
        return node

    def place(self, node: fx.Node, e: Eqn | None) -> None:
        if e is not None:
            node.meta["loc"], node.meta["tag"] = e.loc, e.tag

    def eqn(self, graph: fx.Graph, root: nn.Module, env: dict[Var, fx.Node], e: Eqn) -> None:
        def look(a: Any) -> Any:
            return _boxed(graph, root, map_vars(a, env.__getitem__))

        args, kwargs = tuple(look(a) for a in e.args), {k: look(v) for k, v in e.kwargs}
        node, many = self.call(graph, root, e, args, kwargs)
        self.place(node, e)
        if not many:
            env[e.outs[0]] = self.note(node, e.outs[0], e)
            return
        for i, v in enumerate(e.outs):
            env[v] = self.note(graph.call_function(item, (node, i)), v, e)

    def call(self, graph: fx.Graph, root: nn.Module, e: Eqn, args: Any, kwargs: Any) -> tuple[fx.Node, bool]:
        """The node of an equation, and whether its results are to be taken out of a list."""
        op, f = e.op, graph.call_function
        if isinstance(op, Loop):
            body = self.inner(graph, root, op.body, op.title or "loop")
            rest = (op.n_carry, op.n_const, op.trips, op.reverse)
            return f(loop, (body, args, *rest)), True
        if isinstance(op, Custom):
            body = self.inner(graph, root, op.backward, op.title)
            return f(custom, (body, args, op.n_in, op.n_out, op.present)), True
        if isinstance(op, Grad):
            n = op.n_loss + op.n_wrt
            return f(grad, (args[: op.n_loss], args[op.n_loss : n], args[n:])), True
        if isinstance(op, Call):
            return f(call, (_attribute(graph, root, op.callee, "callee"), args)), True
        if isinstance(op, Index):
            return f(item, (*args, op.at)), False
        if isinstance(op, Primitive):
            known = _FUNCTIONS.get(type(op))
            if known is not None:
                return f(known, args), False
            what = {x.name: str(getattr(op, x.name)) for x in fields(op)}
            return f(effect, (op.name, *args), {**kwargs, **what}), True
        assert isinstance(op, OpOverload)
        node = f(op, args, kwargs)
        if len(op._schema.returns) == 1 and "[]" not in str(op._schema.returns[0].type):
            return node, False
        return f(flatten, (node,)), True

    def inner(self, graph: fx.Graph, root: nn.Module, region: Region, name: str) -> fx.Node:
        return _attribute(graph, root, self.convert(region, re.sub(r"\W+", "_", name)), "body")


def _attribute(graph: fx.Graph, root: nn.Module, value: Any, name: str) -> fx.Node:
    n = sum(k.startswith(name) for k in (*vars(root), *root._modules))
    setattr(root, f"{name}{n}", value)
    return graph.get_attr(f"{name}{n}")


def _boxed(graph: fx.Graph, root: nn.Module, a: Any) -> Any:
    """Generators become attributes: code cannot spell them."""
    if isinstance(a, list | tuple):
        return type(a)(_boxed(graph, root, x) for x in a)
    return _attribute(graph, root, a, "generator") if isinstance(a, torch.Generator) else a
