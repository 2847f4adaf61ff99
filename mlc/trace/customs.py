"""Custom ``autograd.Function``: the forward is recorded as it runs, the user's backward becomes its gradient rule.

The backward is traced with gradients enabled, so its own derivative is PyTorch's double backward: saved inputs and
outputs carry derivatives, intermediate results that the forward saved under ``no_grad`` do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mlc.errors import CaptureError, MlcError
from mlc.ir.builder import Builder, contiguous
from mlc.ir.core import Custom, Eqn, Region, Var
from mlc.ir.types import TensorType
from mlc.record.recorder import Storage
from mlc.trace.recorder.observer import Observer
from mlc.trace.recorder.tracer import Tracer

__all__ = ["apply_custom"]


def apply_custom(tracer: Tracer, cls: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``cls.apply(*args)`` while tracing."""
    if cls.__name__ == "BackwardHookFunction":
        raise CaptureError(
            "a module with a backward hook is called: what the hook does is not an equation of the program",
            loc=tracer.place(),
            advice="remove the hook, or change gradients after backward() in the loop itself",
        )
    ins = [a for a in args if isinstance(a, Tensor)]
    tracked = torch.is_grad_enabled() and any(tracer.carries(t, tracer.handle(t)) for t in ins)
    in_vars = [tracer.read(t, tracked) for t in ins]
    if not tracked:
        return apply(cls, *args, **kwargs)
    with _context_of(cls) as contexts:
        out = apply(cls, *args, **kwargs)
    outs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
    if not contexts or not any(t.requires_grad for t in outs):
        return out
    if getattr(cls.backward, "__code__", None) is not None and cls.backward.__code__.co_filename.endswith(
        "torch/autograd/function.py"
    ):
        raise CaptureError(
            f"{cls.__name__} is marked once_differentiable: its gradient has no derivative",
            loc=tracer.place(),
            advice="write a backward made of differentiable torch operators and remove the mark",
        )
    raw = [tracer.value(tracer.handle(t)) for t in outs]
    mask = 0
    for v in in_vars:
        mask |= v.mask
    if isinstance(tracer, Observer):
        out, outs = _apart(tracer, out, outs, ins)
    results = []
    for t, r in zip(outs, raw, strict=True):
        v = Var(r.type, mask if r.type.is_float else 0)
        if isinstance(tracer, Observer):
            tracer.bind(t, v)
            results.append(v)
            continue
        h = tracer.handle(t)
        if h.chain or any(h.storage is tracer.handle(i).storage for i in ins):
            h.storage, h.chain = Storage(v), ()
        else:
            h.storage.var = v
        h.cached, h.hidden, h.origin = None, False, None
        results.append(v)
    backward, extra, present = _trace_backward(tracer, cls, contexts[0], args, in_vars, results)
    loc, site = tracer.locate()
    op = Custom(cls.__name__, backward, len(in_vars), len(results), present)
    tracer.builder.append(Eqn(op, (*in_vars, *raw, *extra), tuple(results), (), loc, tracer.tag, site))
    return out


def _apart(tracer: Any, out: Any, outs: list[Tensor], ins: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """Results in memories of their own: a Function that gives its input back gives another value all the same."""
    given = {t.untyped_storage()._cdata for t in ins}
    with tracer.pause(), torch.enable_grad():
        moved = {id(t): t.clone() if t.untyped_storage()._cdata in given else t for t in outs}
    if isinstance(out, Tensor):
        return moved[id(out)], [moved[id(out)]]
    kind = type(out)
    return kind(moved.get(id(x), x) for x in out), [moved[id(t)] for t in outs]


@contextlib.contextmanager
def _context_of(cls: Any) -> Iterator[list[Any]]:
    """Catch the ``ctx`` object that a Function's forward (or setup_context) is given."""
    found: list[Any] = []
    separate = cls.setup_context is not torch.autograd.function._SingleLevelFunction.setup_context
    name = "setup_context" if separate else "forward"
    original = getattr(cls, name)

    def catch(ctx: object, *args: object, **kwargs: object) -> Any:
        found.append(ctx)
        return original(ctx, *args, **kwargs)

    own = name in vars(cls)
    before = vars(cls).get(name)
    setattr(cls, name, staticmethod(catch))
    try:
        yield found
    finally:
        if own:
            setattr(cls, name, before)
        else:
            delattr(cls, name)


def _trace_backward(tracer: Tracer, cls: Any, ctx: Any, args: Any, in_vars: list[Var], results: list[Var],
                    ) -> tuple[Region, list[Var], tuple[bool, ...]]:  # fmt: skip
    try:
        with tracer.recording_apart():
            cts = [tracer.fresh(Var(_plain(v.type))) for v in results]
            ct_vars = [tracer.value(tracer.handle(t)) for t in cts]
            with torch.enable_grad():
                grads = cls.backward(ctx, *cts)
            grads = grads if isinstance(grads, tuple) else (grads,)
            wanted = [g for a, g in zip(args, grads, strict=False) if isinstance(a, Tensor)]
            outputs = []
            for g, v in zip(wanted, in_vars, strict=True):
                if g is not None:
                    assert isinstance(v.type, TensorType)
                    outputs.append(tracer.fitted(tracer.value(tracer.handle(g)), v.type))
            eqns = tuple(tracer.builder.eqns)
    except MlcError:
        raise
    except Exception as e:
        raise CaptureError(
            f"the backward of {cls.__name__} cannot be traced: {e}",
            loc=tracer.place(),
            advice="write it with torch operators on the saved tensors",
        ) from e
    inside = {o for e in eqns for o in e.outs}
    given = {*in_vars, *results, *ct_vars}
    free = dict.fromkeys(v for e in eqns for v in e.inputs if v not in inside and v not in given)
    free.update((v, None) for v in outputs if v not in inside and v not in given)
    region = _region(in_vars, results, list(free), ct_vars, eqns, outputs)
    return region, list(free), tuple(g is not None for g in wanted)


def _plain(t: object) -> TensorType:
    assert isinstance(t, TensorType)
    return TensorType(t.dtype, t.shape, contiguous(t.shape), t.device)


def _region(
    ins: list[Var], outs: list[Var], free: list[Var], cts: list[Var], eqns: tuple[Eqn, ...], outputs: list[Var]
) -> Region:
    """Close over values: fresh input for each (an input may be given twice)."""
    b = Builder(merge=False)
    env: dict[Var, Var] = {}
    for v in (*ins, *outs, *free, *cts):
        fresh = b.input(v.type)
        env.setdefault(v, fresh)
    for e in eqns:
        b.copy_eqn(e, env)
    return b.region([env[v] for v in outputs])
