"""What a pass is: graphs in, graphs out, under decisions that are data.

A pass takes one form of a program (:class:`~mlc.ir.program.Program`, the joint graph, or its two stages) and gives the
next one, or the same form rewritten.  What it is to do stands in a :class:`Context`, which a plan determines; what it
found out on the way goes into the context's :class:`Findings`.  Passes do not know each other, nor who verifies, prints
or times them: that is the pipeline's (:mod:`mlc.passes.lowering.pipeline`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from mlc.ir.core import Region
from mlc.ir.lowered.precision import Resolved
from mlc.ir.lowered.responses import Response
from mlc.ir.lowered.stages import Joint, Stages
from mlc.ir.program import Program
from mlc.ir.types import Loc

__all__ = ["Context", "Findings", "Graphs", "Levers", "Modes", "Pass", "Refused", "regions"]

Graphs: TypeAlias = Program | Joint | Stages


@dataclass(frozen=True)
class Levers:
    """What is kept and what is computed again; every setting is exact.

    Attributes:
        price: Seconds of a call that one byte of its peak is worth: for values kept between a step and its adjoint,
            between the stages, inside products, and for what replays of states read.
        slots: Sets of states kept per loop; None: all of them.
        parts: Micro-batches: parts that a batch is split into, where its examples are independent.
        rounds: Most cuts of rematerialisation inside a region.
        offload: Bytes of an element from which on what loops emit for their adjoint rests on the host; None: nothing
            does.
    """

    price: float = 0.0
    slots: int | None = None
    parts: int = 1
    rounds: int = 4
    offload: int | None = None


@dataclass(frozen=True)
class Modes:
    """What ``flows`` means for one program.

    Attributes:
        mode: Of the whole program: ``"mixed"``, ``"reverse"`` or ``"forward"``.
        levels: Modes of the inner gradients of single levels, where they differ from it.
        responses: How the derivative of what a level trained is obtained, by name of the level, where it is not exact.
        off: Paths that are switched off, ``"w -> L1 -> L0"``.
    """

    mode: str = "mixed"
    levels: Mapping[str, str] = field(default_factory=dict)
    responses: Mapping[str, Response] = field(default_factory=dict)
    off: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """Why a batch cannot be split: a reason for people, and the user's line.

    Attributes:
        reason: One sentence.
        loc: Where examples meet; None when no line is to blame.
        work: How far single examples had been followed until then: heavy operators, bytes of values.
        divides: Whether it is only that the batch cannot be cut into so many equal parts.
        at: Position of the equation where they meet; None when it is not about one.
    """

    reason: str
    loc: Loc | None = None
    work: tuple[int, int] = (0, 0)
    divides: bool = False
    at: int | None = None


@dataclass
class Findings:
    """What passes found out, for the plan to say.

    Attributes:
        mode: The mode that was used; another than the one asked for where that was not possible.
        why_not: Why it is not the one asked for; empty when it is.
        fallbacks: Inner gradients that go in reverse over reverse because they have to: reasons by place.
        refused: Why batches could not be split.
    """

    mode: str = ""
    why_not: str = ""
    fallbacks: dict[str, str] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """Under what passes work.

    Attributes:
        modes: Which way derivatives go.
        stop: Meaning of stops: ``"all"``, ``"inner"`` or ``"torch"``.
        levers: What is kept and what is computed again.
        precision: In which dtypes levels and flows compute and store; None: exact.
        findings: Where passes write what they found out.
    """

    modes: Modes = field(default_factory=Modes)
    stop: str = "all"
    levers: Levers = field(default_factory=Levers)
    precision: Resolved | None = None
    findings: Findings = field(default_factory=Findings)


@runtime_checkable
class Pass(Protocol):
    """One rewriting of graphs.

    Attributes:
        name: What ``mlc inspect --after`` and ``passes=`` call it; unique in a pipeline.
        takes: The form of graphs that it works on; the pipeline leaves it out for another one (in forward mode there is
            no joint graph).
        ensures: What holds afterwards, in one sentence.
    """

    @property
    def name(self) -> str:
        """What the pass is called."""
        ...

    @property
    def takes(self) -> type[Program] | type[Joint] | type[Stages]:
        """The form of graphs that it works on."""
        ...

    @property
    def ensures(self) -> str:
        """What holds afterwards."""
        ...

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        """The graphs, rewritten; values of results and hypergradients stay what they are."""
        ...


def regions(graphs: Graphs) -> Iterator[tuple[str, Region]]:
    """The regions of a form, by name, in the order in which they run."""
    if isinstance(graphs, Program):
        yield "program", graphs.region
    elif isinstance(graphs, Joint):
        yield "joint", graphs.region
    else:
        yield "forward", graphs.forward
        if graphs.backward is not None:
            yield "backward", graphs.backward
