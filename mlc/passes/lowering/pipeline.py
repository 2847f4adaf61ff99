"""The pipeline: which passes there are, in which order they run, and who looks on.

A program becomes its stage graphs by the passes of :data:`PIPELINE`, first to last.  Nothing else orders them, and no
pass calls another.  Whoever wants to verify, print, time or compare looks on as a :data:`Watcher`; with
``MLC_VERIFY=1`` in the environment the verifier does between all passes.

Passes are values: a pipeline of your own is another tuple (``mlc.compile(..., passes=...)``), see ``docs/passes.md``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mlc.errors import PlanError, VerifyError
from mlc.ir.lowered.contract import Context, Graphs, Pass, regions
from mlc.ir.lowered.stages import Joint, Stages
from mlc.ir.program import Program
from mlc.ir.verify import verify
from mlc.passes.lowering.differentiate import Differentiate
from mlc.passes.microbatch.batches import MicroBatches
from mlc.passes.precision.store import Store
from mlc.passes.remat.cut import Cut
from mlc.passes.remat.keep import Residuals, States
from mlc.passes.remat.offload import Offload
from mlc.passes.remat.shrink import Rematerialise

__all__ = [
    "PIPELINE",
    "Passes",
    "Step",
    "Watcher",
    "check_passes",
    "differentiated",
    "lowered",
    "names",
    "run",
    "verifier",
]

Passes: TypeAlias = tuple[Pass, ...]

PIPELINE: Passes = (
    Differentiate(),  # program -> joint: values and hypergradients in one graph (forward mode: the stages at once)
    Residuals(),  # what each step keeps for its adjoint
    States(),  # which states of a loop are kept, and which are replayed
    Store(),  # what a precision policy keeps in fewer bits
    Cut(),  # joint -> stages: what runs at the call, and what at backward()
    MicroBatches(),  # loops over parts of a batch
    Rematerialise(),  # order, and what is computed again
    Offload(),  # what rests on the host in between
)


@dataclass(frozen=True)
class Step:
    """One pass that ran.

    Attributes:
        of: The pass.
        before: What it took.
        after: What it gave.
        seconds: How long it took.
    """

    of: Pass
    before: Graphs
    after: Graphs
    seconds: float


Watcher: TypeAlias = Callable[[Step], None]


def run(passes: Sequence[Pass], graphs: Graphs, context: Context, watchers: Sequence[Watcher] = ()) -> Graphs:
    """Run passes in order; one whose form of graphs is not there is left out.

    Args:
        passes: A pipeline or a part of one.
        graphs: What the first pass takes.
        context: The decisions.
        watchers: Called after every pass.

    Raises:
        VerifyError: with ``MLC_VERIFY=1``, when a pass leaves graphs that break an invariant, naming it.
    """
    if os.environ.get("MLC_VERIFY") == "1":
        watchers = (*watchers, verifier)
    for p in passes:
        if not isinstance(graphs, p.takes):
            continue
        start = time.perf_counter()
        after = p.apply(graphs, context)
        step = Step(p, graphs, after, time.perf_counter() - start)
        for watch in watchers:
            watch(step)
        graphs = after
    return graphs


def verifier(step: Step) -> None:
    """Check the invariants of what a pass gave.

    Raises:
        VerifyError: naming the pass, the region and what does not hold.
    """
    if not isinstance(step.after, (Program, Joint, Stages)):
        raise VerifyError(f"pass {step.of.name!r} gave a {type(step.after).__name__}, not graphs")
    for name, region in regions(step.after):
        verify(region, f"{name} after {step.of.name}")
    if isinstance(step.before, (Joint, Stages)) and isinstance(step.after, (Joint, Stages)):
        kept = ("n_results", "cotangents", "gradients")
        changed = [x for x in kept if getattr(step.before, x) != getattr(step.after, x)]
        if changed:
            raise VerifyError(f"pass {step.of.name!r} changed {', '.join(changed)}: results are not its to choose")


def differentiated(program: Program, context: Context, passes: Sequence[Pass] = PIPELINE) -> Joint | Stages:
    """The program after the passes that do not depend on levers: those up to the last one that takes a program.

    Raises:
        PlanError: when these passes leave a program, or something that is no graphs at all.
    """
    found = run(passes[: _split(passes)], program, context)
    if not isinstance(found, (Joint, Stages)):
        raise PlanError(
            f"the passes that take a program end with a {type(found).__name__}",
            advice="keep the pass 'differentiate' as the last of them",
        )
    return found


def lowered(joint: Joint | Stages, context: Context, passes: Sequence[Pass] = PIPELINE) -> Stages:
    """What :func:`differentiated` gave after all other passes.

    Raises:
        PlanError: when these passes leave no stages.
    """
    found = run(passes[_split(passes) :], joint, context)
    if not isinstance(found, Stages):
        raise PlanError("these passes give no stages", advice="keep the pass 'cut' in the pipeline")
    return found


def _split(passes: Sequence[Pass]) -> int:
    return max((i + 1 for i, p in enumerate(passes) if p.takes is Program), default=0)


def names(passes: Sequence[Pass]) -> tuple[str, ...]:
    """Names of passes, in order."""
    return tuple(p.name for p in passes)


def check_passes(passes: Any) -> Passes:
    """The pipeline that a user gave; None means :data:`PIPELINE`.

    Raises:
        PlanError: when it is none, saying which entry is wrong.
    """
    if passes is None:
        return PIPELINE
    advice = "start from mlc.PIPELINE, which is a tuple of passes"
    if not isinstance(passes, Sequence) or isinstance(passes, (str, bytes)):
        raise PlanError(f"passes={passes!r}", advice=advice)
    for p in passes:
        if not isinstance(p, Pass) or isinstance(p, type) or p.takes not in (Program, Joint, Stages):
            what = getattr(p, "__name__", repr(p))
            raise PlanError(
                f"passes: {what} is no pass", advice="a pass has a name, takes, ensures and apply(graphs, context)"
            )
    found = names(passes)
    twice = sorted({n for n in found if found.count(n) > 1})
    if twice:
        raise PlanError(f"passes: two are named {twice[0]!r}", advice="give each pass a name of its own")
    if not any(p.takes is Program for p in passes):
        raise PlanError("passes: none takes a program", advice="keep the pass 'differentiate', which begins")
    return tuple(passes)
