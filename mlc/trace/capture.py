"""From one call of the user's function to a flat recording: equations, outside tensors, outputs, effects."""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from mlc.errors import CaptureError, MlcError
from mlc.ir.core import Eqn, Var
from mlc.ir.lowered.responses import Response
from mlc.ir.types import Loc
from mlc.trace.environment import (
    current,
    default_dtype_kept,
    eager_dynamo,
    iterators_elsewhere,
    numbers_in_optimizers,
    quiet,
    zero_grad,
)
from mlc.trace.faketracer import FakeTracer
from mlc.trace.generators import kept
from mlc.trace.iterables import Source, Sources, loader_patches, substitute, swapped
from mlc.trace.numbers.placeholders import TracedScalar
from mlc.trace.optimizers import narrow_counts, restore_flags
from mlc.trace.patches import on_this_thread, patched, replaced
from mlc.trace.python.frames import is_user_code
from mlc.trace.python.inputs import walk
from mlc.trace.python.places import Path, Roots
from mlc.trace.python.state import Change, Watch, parts
from mlc.trace.recorder.concrete import Guard
from mlc.trace.recorder.externals import External, Step

__all__ = ["Recording", "record"]


@dataclass
class Effect:
    """Something of the user's that the call leaves changed.

    ``kind``: ``"copy"`` (write the value into ``owner``, a tensor), ``"grad"`` (set ``owner.grad``), or the kinds of
    :class:`~mlc.trace.python.state.Change`.  ``value`` is a tree whose tensors are replaced by :class:`Ref`.
    """

    kind: str
    owner: Any
    path: Path | None
    key: Any
    value: Any
    key_path: Path | None = None


@dataclass(frozen=True)
class Ref:
    """Position of a value among the results of the program; ``number``: as a Python number, of this ``kind``."""

    index: int
    number: bool = False
    kind: Any = None


@dataclass
class Recording:
    """One traced call."""

    eqns: list[Eqn]
    externals: list[External]
    results: list[Var]
    n_outputs: int
    out_spec: Any
    out_leaves: list[Any]
    effects: list[Effect]
    sources: list[Source]
    steps: list[Step]
    roots: Roots
    reusable: bool
    notes: list[str]
    guards: list[Guard]
    grad_guards: list[tuple[Path | None, Tensor, bool]]
    function: str
    loc: Loc | None
    stops: list[Eqn] = field(default_factory=list)
    arg_names: tuple[str, ...] = ()
    decisions: list[tuple[int, Any, str, Loc | None]] = field(default_factory=list)
    generators: list[torch.Generator] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    averaged: dict[int, str] = field(default_factory=dict)  # groups of parameters that are trained in parallel, by id
    circle: tuple[int, ...] = ()  # ranks that the call communicates with
    responses: dict[str, Response | None] = field(default_factory=dict)

    @property
    def handed(self) -> frozenset[int]:
        """Positions of results that the user's objects take over (others are copied into theirs, or read)."""
        values = [_refs(e.value) for e in self.effects if e.kind != "copy"]
        return frozenset(range(self.n_outputs)).union(*values)


def _refs(value: object) -> set[int]:
    """Positions of the tensors in a tree of an :class:`Effect`."""
    return {x.index for x in parts(value) if isinstance(x, Ref) and not x.number}


def _call(tracer: FakeTracer, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    tracer.sites.begin(sys._getframe())
    return fn(*args, **kwargs)


def record(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], roots: Roots | None = None
) -> Recording:
    """Trace one call.  Nothing of the user's is changed, whether it succeeds or not.

    Raises:
        CaptureError: when something in the loop cannot be represented exactly.
    """
    roots = roots or walk(fn, args, kwargs)
    tracer = FakeTracer(roots.tensors)
    sources = Sources(tracer, roots)
    watch = Watch(roots)
    active = on_this_thread()
    iterate, length = loader_patches(sources, roots.loaders, active)
    batches, iterators = roots.batches, roots.iterators
    host = None
    try:
        with contextlib.ExitStack() as stack:
            put = stack.enter_context
            swaps = put(swapped())
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            new = {k: substitute(v, ("args", k), batches, iterators, sources, swaps) for k, v in given.items()}
            new_args, new_kwargs = tuple(new[i] for i in range(len(args))), {k: new[k] for k in kwargs}
            put(quiet())
            put(default_dtype_kept())
            put(kept())
            put(patched(tracer))
            put(zero_grad(tracer, active))
            put(numbers_in_optimizers())
            put(replaced(DataLoader, "__iter__", iterate))
            put(replaced(DataLoader, "__len__", length))
            put(iterators_elsewhere(fn, roots, sources, swaps))
            put(sdpa_kernel(SDPBackend.MATH))
            put(torch.backends.mkldnn.flags(enabled=False))
            put(torch.enable_grad())
            put(eager_dynamo())
            put(current(tracer))
            with tracer:
                out = _call(tracer, fn, new_args, new_kwargs)
                sources.check_random()
                tracer.sites.end()
                narrow_counts(tracer)
                host = _finish(tracer, fn, out, roots, watch, sources)
    except MlcError:
        raise
    except Exception as e:
        if _users_own(e):
            raise
        raise _explain(e, tracer) from e
    finally:
        for saved in tracer.flags:
            restore_flags(saved)
        watch.restore()
        tracer.sites.end()
    _clean(tracer)
    return host


def _users_own(e: Exception) -> bool:
    """Whether an exception was raised by the user's own code (then it is theirs to see as it is)."""
    tb = e.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    if tb is None or not is_user_code(tb.tb_frame.f_code):
        return False
    op = dis.opname[tb.tb_frame.f_code.co_code[tb.tb_lasti]]
    return op in ("RAISE_VARARGS", "RERAISE", "ASSERT")


def _explain(e: Exception, tracer: FakeTracer) -> CaptureError:
    """An exception of the user's code or of torch while tracing, with the user's line."""
    loc = None
    tb = e.__traceback__
    while tb is not None:
        code = tb.tb_frame.f_code
        if is_user_code(code):
            loc = Loc(code.co_filename, tb.tb_lineno, code.co_name)
        tb = tb.tb_next
    text = str(e).strip().split("\n")[0]
    advice = "run the function without mlc to see whether it fails there as well"
    if "grad can be implicitly created only for scalar" in text:
        advice = "reduce the loss to a scalar (.mean() or .sum()) before backward()"
    return CaptureError(f"{type(e).__name__} while tracing: {text}", loc=loc, advice=advice)


def _clean(tracer: FakeTracer) -> None:
    """Drop what only tracing needed."""
    tracer.handles.clear()
    tracer.grads.clear()


def _finish(tracer: FakeTracer, fn: object, out: object, roots: Roots, watch: Watch, sources: Sources) -> Recording:
    """Collect results and effects (still under the tracer, so that views can be derived)."""
    results: list[Var] = []

    def ref(x: object) -> Any:
        if isinstance(x, TracedScalar):
            results.append(tracer.value(tracer.handle(x.tensor)))
            return Ref(len(results) - 1, number=True)
        if isinstance(x, Tensor):
            h = tracer.handle(x)
            v = tracer.value(h)
            if not tracer.carries(x, h) and v.mask and v.type.is_float:
                v = tracer.stopped(v, h)
            results.append(v)
            return Ref(len(results) - 1)
        return x

    leaves, spec = pytree.tree_flatten(out)
    out_leaves = [ref(x) for x in leaves]
    n_outputs = len(results)
    effects = _effects(tracer, roots, watch, results)
    reusable, notes = _reuse(sources)
    loc = place_of(fn)
    grad_guards = [(roots.tensors.get(id(t)), t, none) for t, none in tracer.grad_reads.values()]
    return Recording(
        tracer.builder.eqns, list(tracer.externals.values()), results, n_outputs, spec, out_leaves, effects,
        sources.all, tracer.steps, roots, reusable, notes, tracer.guards, grad_guards,
        getattr(fn, "__name__", "program"), loc, tracer.stop_log, arg_names(fn),
        responses=tracer.responses,
    )  # fmt: skip


def _code_of(fn: object) -> Any:
    return getattr(fn, "__code__", None) or getattr(getattr(fn, "__func__", None), "__code__", None)


def place_of(fn: object) -> Loc | None:
    """Where a function is defined."""
    code = _code_of(fn)
    return Loc(code.co_filename, code.co_firstlineno, code.co_name) if code is not None else None


def path_name(path: Sequence[Any], parameters: Sequence[str] = ()) -> str:
    """Readable form of a path: ``model.0.weight``, ``batches[3][0]``; ``parameters``: of the function."""
    if path[0] == "args" and isinstance(path[1], int) and path[1] < len(parameters):
        path = ("args", parameters[path[1]], *path[2:])
    parts = [p for p in path if p not in ("args", "fn", "closure", "globals", "self")]
    if path[0] == "globals":
        parts = parts[1:]
    out = ""
    for p in parts:
        s = str(p)
        out += (
            f"[{p}]"
            if isinstance(p, int) and out
            else (s if s.startswith(".") and out else ("." if out else "") + s.lstrip("."))
        )
    return out or "input"


def arg_names(fn: object) -> tuple[str, ...]:
    """Names of a function's parameters."""
    code = _code_of(fn)
    return tuple(code.co_varnames[: code.co_argcount]) if code is not None else ()


def _reuse(sources: Sources) -> tuple[bool, list[str]]:
    notes = []
    if sources.host_random:
        notes.append("traced anew at every call: the loop draws from Python's or NumPy's random generator")
    if any(s.mixed for s in sources.all):
        notes.append(
            "traced anew at every call: an iterable yields values that are not tensors, or is made in the call"
        )
    return not notes, notes


def _effects(tracer: FakeTracer, roots: Roots, watch: Watch, results: list[Var]) -> list[Effect]:
    """Final values of everything of the user's that the loop wrote."""
    effects: list[Effect] = []

    def value(x: object) -> Any:
        if isinstance(x, TracedScalar):
            x_t, number = x.tensor, True
        elif isinstance(x, Tensor):
            x_t, number = x, False
        elif isinstance(x, dict):
            return {k: value(v) for k, v in x.items()}
        elif isinstance(x, (list, tuple)):
            return type(x)(value(v) for v in x)
        else:
            return x
        if id(x_t) in tracer.externals and not number:
            return x_t
        results.append(tracer.value(tracer.handle(x_t)))
        return Ref(len(results) - 1, number=number)

    for ext in list(tracer.externals.values()):
        if ext.written:
            results.append(ext.handle.storage.var)
            effects.append(Effect("copy", ext.tensor, ext.path, None, Ref(len(results) - 1)))
    for t, g in list(tracer.grads.values()):
        ext_ = tracer.externals.get(id(t))
        if ext_ is None or not t.is_leaf or not ext_.written:
            continue
        effects.append(Effect("grad", t, ext_.path, None, None if g is None else value(g)))
    for c in watch.changes():
        effects.append(_effect_of(c, roots, value))
    return effects


def _effect_of(c: Change, roots: Roots, value: Callable[[Any], Any]) -> Effect:
    if c.kind == "state":
        p, name = c.key
        return Effect("state", c.owner, c.path, (p, name), value(c.value), roots.tensors.get(id(p)))
    return Effect(c.kind, c.owner, c.path, c.key, value(c.value))
