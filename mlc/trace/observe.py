"""The first call of a structure: the user's function runs for real, and what it did becomes a recording."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from mlc.errors import CaptureError
from mlc.ir.lowered.responses import Response
from mlc.ir.types import Loc
from mlc.trace.capture import Recording
from mlc.trace.communication.rollcall import rollcall
from mlc.trace.environment import current, default_dtype_kept, eager_dynamo, iterators_elsewhere, quiet
from mlc.trace.finish import Finish
from mlc.trace.gradients.grads import put_grad
from mlc.trace.interception import intercepted
from mlc.trace.iterables import Sources, loader_patches, substitute, swapped
from mlc.trace.numbers.ending import retire
from mlc.trace.numbers.mode import NumberMode
from mlc.trace.numbers.patches import followed
from mlc.trace.numbers.types import conversions, linked_max, linked_min
from mlc.trace.optimizers import hook_classes, narrow_counts, restore_flags
from mlc.trace.patches import replaced
from mlc.trace.python.changes import without
from mlc.trace.python.found import Found
from mlc.trace.python.frames import is_user_module
from mlc.trace.python.inputs import walk
from mlc.trace.python.places import Path, Roots
from mlc.trace.python.reads import Reads
from mlc.trace.python.world import World
from mlc.trace.recorder.externals import External
from mlc.trace.recorder.observer import Observer
from mlc.trace.recorder.randomness import RandomWatch

__all__ = ["Observation", "observe"]

_BASE: Any = torch._C.TensorBase


@dataclass
class Observation:
    """What one real run left: the recording, what it returned, and how to undo it.

    Attributes:
        recording: The run as equations.
        out: What the user's function returned.
        reals: The tensor (or number) that the run computed for each result of the recording.
        observer: Keeps what memories held before.
        world: The user's objects as they were.
        found: What Python read.
        key: What must be equal for the recording to be used again.
        ignored: Places that the call changes without reading them.
        random: States of the generators at the start and at the end of the run.
    """

    recording: Recording
    out: Any
    reals: list[Any]
    observer: Observer
    world: World
    found: Found
    key: list[Any]
    ignored: set[Any]
    random: tuple[list[Any], list[Any]]
    items: dict[tuple[int, int], list[Any]] = field(default_factory=dict)

    def initial(self, x: External) -> Tensor:
        """What a tensor from outside held before the call."""
        return self.observer.snapshots.before(x.held) if x.kept is None else x.kept

    def release(self) -> None:
        """The call is over: let go of what only its first run needed."""
        self.observer.snapshots.clear()
        self.observer.memories.clear()
        self.observer.ended = True
        self.observer.rehearsal.clear()
        self.reals = []
        self.out = None
        for src in self.recording.sources:
            src.visits = [([None] * len(items), done) for items, done in src.visits]

    def undo(self) -> None:
        """Put everything of the user's back as it was before the call."""
        _undo(self.observer, self.world)
        RandomWatch.put(self.random[0])


def observe(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    drawn: dict[Path, list[Any]] | None = None,
    flows: Any = None,
) -> Observation:
    """Run one call for real and record it.

    Args:
        fn: The user's function.
        args: Of the call.
        kwargs: Of the call.
        drawn: Items taken from iterators before, which come first.
        flows: As :func:`mlc.compile` takes it: responses of levels that gradients of the loop go through.

    Raises:
        CaptureError: when something in the loop cannot be represented exactly (nothing of the user's is changed then).
        Exception: what the user's function itself raises.
    """
    hook_classes()
    roots = walk(fn, args, kwargs)
    roots.drawn = drawn or {}
    world = World(roots)
    generators = [g for g in roots.objects.values() if isinstance(g, torch.Generator)]
    ob = Observer(roots.tensors, list(roots.at.values()), generators)
    ob.flows = {n: r for n, r in flows.items() if isinstance(r, Response)} if isinstance(flows, Mapping) else {}
    sources = Sources(ob, roots)
    ob.roll = rollcall(getattr(fn, "__qualname__", type(fn).__name__))
    try:
        seen = _observed(fn, args, kwargs, roots, ob, sources, world)
        if ob.roll is not None:
            ob.roll.end()
            seen.recording.circle = ob.roll.circle
            seen.recording.averaged = ob.parallel.averaged()
        return seen
    except BaseException as e:
        if ob.roll is not None:
            ob.roll.failed(e)
        for saved in ob.flags:
            restore_flags(saved)
        _undo(ob, world)
        RandomWatch.put(list(ob.random.start.values()))
        if ob.refusal is not None and e is not ob.refusal:
            raise ob.refusal from e
        raise
    finally:
        retire(ob)
        ob.ended = True


def _observed(
    fn: Any, args: Any, kwargs: Any, roots: Roots, ob: Observer, sources: Sources, world: World
) -> Observation:
    with contextlib.ExitStack() as stack:
        put = stack.enter_context
        put(quiet())
        put(default_dtype_kept())
        active, gradients = put(intercepted(ob))
        iterate, length = loader_patches(sources, roots.loaders, active)
        swaps = put(swapped())
        given = {**dict(enumerate(args)), **kwargs}
        new = {k: substitute(v, ("args", k), roots.batches, roots.iterators, sources, swaps) for k, v in given.items()}
        new_args, new_kwargs = tuple(new[i] for i in range(len(args))), {k: new[k] for k in kwargs}
        put(replaced(DataLoader, "__iter__", iterate))
        put(replaced(DataLoader, "__len__", length))
        put(_optimizers_numbers())
        put(sdpa_kernel(SDPBackend.MATH))
        put(torch.backends.mkldnn.flags(enabled=False))
        put(torch.enable_grad())
        put(eager_dynamo())
        put(current(ob))
        with (
            ob,
            iterators_elsewhere(fn, roots, sources, swaps),
            followed(),
            conversions(_user_modules(fn)),
            NumberMode(ob),
        ):
            swaps.ready()
            out = _call(ob, fn, new_args, new_kwargs)
            ob.sites.end()  # frames of the user's hold what the run was given
            swaps.back()
        reads = ob.reads
        assert reads is not None
        with ob:
            sources.check_random()
            _refuse_hooks_of_nodes(ob, reads)
            ob.parallel.end()
            if ob.refusal is not None:
                raise ob.refusal
            with ob.pause():
                calm, end = ob.random.undisturbed(), ob.random.states()
            narrow_counts(ob)
            with ob.pause():
                found = reads.found(fn, args, kwargs, world)
                kept = walk(fn, args, kwargs, found, world)
                grown = world.grown(kept.batches)
                if grown:
                    found = replace(found, changed=grown)
                    kept = walk(fn, args, kwargs, found, world)
            finish = Finish(ob, gradients, kept, world)
            recording = finish.finish(fn, out, found, sources, calm)
    start = list(ob.random.start.values())
    ignored = finish.changes.ignored
    key = list(without(kept.key, ignored))
    return Observation(recording, out, finish.reals, ob, world, found, key, ignored, (start, end))


def _call(ob: Observer, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with Reads() as reads:
        ob.reads = reads
        ob.sites.begin(sys._getframe())
        return fn(*args, **kwargs)


def _refuse_hooks_of_nodes(ob: Observer, reads: Reads) -> None:
    """Hooks that the loop put on nodes of PyTorch's graph (``grad_fn``), which run unseen."""
    if reads.hooked_nodes:
        code, line = reads.hooked_nodes[0]
        ob.refusal = ob.refusal or CaptureError(
            "a backward hook is put on a node of PyTorch's graph (grad_fn)",
            loc=Loc(code.co_filename, line, code.co_name),
            advice="put it on the tensor instead: t.register_hook(...)",
        )


def _user_modules(fn: object) -> list[dict[str, Any]]:
    """Globals of the user's modules: of the function's own, and of all that are no library."""
    scopes = [vars(m) for m in list(sys.modules.values()) if is_user_module(m)]
    own = getattr(getattr(fn, "__func__", fn), "__globals__", None)
    return scopes if own is None or any(s is own for s in scopes) else [*scopes, own]


@contextlib.contextmanager
def _optimizers_numbers() -> Iterator[None]:
    """Adafactor takes ``max(1.0, norm.item())``: the link is kept there."""
    from torch.optim import _adafactor

    scope = vars(_adafactor)
    scope.update(min=linked_min, max=linked_max)
    try:
        yield
    finally:
        del scope["min"], scope["max"]


def _undo(ob: Observer, world: World) -> None:
    with torch.no_grad():
        ob.snapshots.restore()
    world.restore()
    for t, g in ob.initial_grads.values():
        put_grad(t, g)
