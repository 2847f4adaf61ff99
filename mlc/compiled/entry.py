"""One recording of a compiled function with everything that is needed to use it again, and whether a call may."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mlc.compiled.growth import Counts
from mlc.compiled.health import Health
from mlc.compiled.precise import PrecisionCost
from mlc.ir.opaque.estimates import Recall
from mlc.ir.program import Program
from mlc.passes.formulas.tripcounts import Group
from mlc.runtime.call import Executor
from mlc.runtime.interpreter.feeds import Drawer
from mlc.trace.capture import Recording
from mlc.trace.python.changes import without
from mlc.trace.python.found import Found
from mlc.trace.python.places import Path, Roots
from mlc.trace.recorder.externals import External
from mlc.view.plan import Plan, stages_for

__all__ = ["Entry", "executor_of", "fits", "generator_states", "given_back", "inputs_of", "iterable"]


@dataclass
class Entry:
    """One traced program with everything needed to use it again."""

    key: list[Any]
    found: Found
    ignored: set[Path]
    recording: Recording
    program: Program
    plan: Plan
    executor: Executor
    lengths: dict[Path, int]
    calls: int = 0
    stale: int = 0  # calls in a row whose guards did not hold
    smaller: bool = False  # planned again because memory was refused
    loops: dict[int, Group] = field(default_factory=dict)  # open ones, by the iterable that they run over
    world: tuple[int, int] | None = None  # rank and number of processes
    averages: dict[int, list[str]] = field(default_factory=dict)  # groups, by position of the input
    fitting: Counts = field(default_factory=dict)  # trips that were found to fit
    health: Health = field(default_factory=Health)
    infinite: set[int] = field(default_factory=set)  # results in which an infinity is no fault
    particles: Recall | None = None  # what its forward stage asks of particles
    cost: PrecisionCost | None = None  # of its precision policy, as measured at the recorded call


def executor_of(program: Program, plan: Plan) -> Executor:
    """A plan, ready to run."""
    matmul = plan.precision.matmul if plan.precision is not None else ""
    return Executor(stages_for(program, plan), plan.backend, matmul)


def iterable(entry: Entry, roots: Roots, source: int) -> Any:
    """The iterable that now stands where this one stood."""
    src = entry.recording.sources[source]
    if src.path is None:
        return src.object
    found = roots.batches.get(src.path)
    found = roots.iterators.get(src.path) if found is None else found
    found = roots.objects.get(src.path) if found is None else found
    return src.object if found is None else found


def inputs_of(entry: Entry, roots: Roots) -> list[Tensor]:
    """What now stands where each input of the program stood."""
    return [found_in(x, roots) for x in entry.recording.externals]


def fits(entry: Entry, roots: Roots) -> bool:
    """Whether everything that the recorded run read is as it was."""
    rec = entry.recording
    if list(without(roots.key, entry.ignored)) != entry.key:
        return False
    for path, n in entry.lengths.items():
        found = roots.batches.get(path, roots.objects.get(path))
        if found is not None and len(found) != n:
            return False
    if not all(_stands(x, rec.roots, roots) for x in _by_reference(rec)):
        return False
    for where, t, none in rec.grad_guards:
        now = roots.at.get(where, t) if where is not None else t
        if (now.grad is None) != none:
            return False
    return all(g.holds(lambda x: found_in(x, roots)) for g in rec.guards)


def _by_reference(rec: Recording) -> list[Any]:
    """Objects that the program uses as they were: generators, datasets of loaders that the call itself made."""
    loaders = [s.object for s in rec.sources if s.path is None and isinstance(s.object, DataLoader)]
    generators = [g for g in rec.roots.objects.values() if isinstance(g, torch.Generator)]
    return [*generators, *[x.dataset for x in loaders]]


def _stands(x: object, before: Roots, now: Roots) -> bool:
    """Whether an object still stands at every place where it stood."""
    pairs = ((before.objects, now.objects), (before.batches, now.batches))
    return all(b.get(path) is x for a, b in pairs for path, y in a.items() if y is x)


def found_in(x: External, roots: Roots) -> Tensor:
    """The tensor that now stands where ``x`` stood."""
    if x.parts:
        return _whole(found_in(x.parts[0], roots), x.held.dtype)
    now = roots.at.get(x.path) if x.path is not None else None
    return x.tensor if now is None else now


def _whole(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Everything in the memory of a tensor, as one vector."""
    s = t.untyped_storage()
    with torch.no_grad():
        return torch.empty(0, dtype=dtype, device=t.device).set_(s, 0, (s.nbytes() // dtype.itemsize,), (1,))


def generator_states(entry: Entry) -> list[Any]:
    """States of the generators that a program draws from."""
    return [(None, torch.get_rng_state()), *((g, g.get_state()) for g in entry.recording.generators)]


def given_back(entry: Entry, roots: Roots, drawer: Drawer) -> dict[Path, list[Any]]:
    """Items that a call drew from iterators before it turned out to be another program: they come first now."""
    sources = enumerate(entry.recording.sources)
    return {src.path: drawer.items[s] for s, src in sources if src.once and src.path is not None and s in drawer.items}
