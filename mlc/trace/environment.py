"""What is set for the time of a trace and put back after it: iterators, ``zero_grad``, warnings."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mlc.trace.iterables import Sources, Swaps, substitute
from mlc.trace.numbers.placeholders import traced_max, traced_min
from mlc.trace.patches import replaced
from mlc.trace.python.places import Roots
from mlc.trace.recorder.tracer import Tracer


@contextlib.contextmanager
def iterators_elsewhere(fn: object, roots: Roots, sources: Sources, swaps: Swaps) -> Iterator[None]:
    """Iterators in closures, globals and attributes, replaced for the time of the trace."""
    undo: list[Callable[[], None]] = []

    def cell(c: Any, new: Any, old: Any) -> Callable[[], None]:
        def put() -> None:
            if c.cell_contents is new:  # the user's code may have bound something else
                c.cell_contents = old

        return put

    def put_global(scope: dict[str, Any], name: str, new: object, old: object) -> Callable[[], None]:
        def put() -> None:
            if scope.get(name) is new:
                scope[name] = old

        return put

    try:
        f = fn.__func__ if isinstance(fn, types.MethodType) else fn
        for path, x in [*roots.iterators.items(), *roots.batches.items()]:
            if path[0] == "args" or not isinstance(f, types.FunctionType):
                continue
            new = substitute(x, path, roots.batches, roots.iterators, sources, swaps)
            if new is x:
                continue
            if path[:2] == ("fn", "closure") and len(path) == 3:
                c = (f.__closure__ or ())[f.__code__.co_freevars.index(path[2])]
                undo.append(cell(c, new, x))
                c.cell_contents = new
            elif path[0] == "globals" and len(path) == 3 and f.__globals__.get(path[2]) is x:
                undo.append(put_global(f.__globals__, path[2], new, x))
                f.__globals__[path[2]] = new
        yield
    finally:
        for u in undo:
            u()


@contextlib.contextmanager
def zero_grad(tracer: Tracer, active: Callable[[], bool]) -> Iterator[None]:
    """``zero_grad`` as a statement about gradients, whatever is there now."""
    opt_zero, mod_zero = torch.optim.Optimizer.zero_grad, torch.nn.Module.zero_grad

    def zero(original: Any, params: Callable[[Any], Iterator[Tensor]]) -> Any:
        def run(self: Any, set_to_none: bool = True) -> None:
            if not active() or not set_to_none:
                original(self, set_to_none)
                return
            for p in params(self):
                tracer.set_grad(p, None)

        return run

    with (
        replaced(
            torch.optim.Optimizer,
            "zero_grad",
            zero(opt_zero, lambda o: (p for g in o.param_groups for p in g["params"])),
        ),
        replaced(torch.nn.Module, "zero_grad", zero(mod_zero, lambda m: m.parameters())),
    ):
        yield


@contextlib.contextmanager
def numbers_in_optimizers() -> Iterator[None]:
    """Optimizers that take ``max(1.0, norm.item())`` of traced numbers see differentiable ``min`` and ``max``."""
    from torch.optim import _adafactor

    scope = vars(_adafactor)
    scope.update(min=traced_min, max=traced_max)
    try:
        yield
    finally:
        del scope["min"], scope["max"]


@contextlib.contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Put the default dtype back (optimizer steps are traced with float64)."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def current(tracer: Tracer) -> Iterator[None]:
    """Make the tracer known to :func:`mlc.clone`."""
    before, Tracer.current = Tracer.current, tracer
    try:
        yield
    finally:
        Tracer.current = before


@contextlib.contextmanager
def eager_dynamo() -> Iterator[None]:
    """Modules under ``torch.compile`` run eagerly while tracing."""
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None:
        yield
        return
    with stance("force_eager"):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Schedulers warn when optimizer.step was not called through their wrapper; ours is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        warnings.filterwarnings("ignore", message=".*TF32 acceleration on top of oneDNN.*")
        warnings.filterwarnings("ignore", message=".*The .grad attribute of a Tensor that is not a leaf.*")
        yield
