"""The facts of a program: its region with the meaning of inputs and outputs, levels and flows.

:class:`mlc.ir.program.Program` is this with its text form and its level graph; what prints, walks or compares programs
needs the facts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlc.errors import MlcWarning
from mlc.ir.core import Eqn, Loop, Region
from mlc.ir.types import Loc, Type

__all__ = ["Flow", "Input", "Level", "Problem"]


@dataclass(frozen=True)
class Input:
    """A tensor that the program reads from outside.

    Attributes:
        name: Where it was found, readable (``model.0.weight``).
        role: ``"meta"`` (differentiated), ``"trained"`` (a parameter that the loop trains), ``"state"``
            (anything else that the loop writes: optimizer state, buffers), ``"data"``.
        type: Its type.
        path: Where to read it at the next call; None means the very object met at trace time.
    """

    name: str
    role: str
    type: Type
    path: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Level:
    """What one optimizer, or one manual update, trains.

    Attributes:
        name: ``L0`` for the outermost, then by nesting and order.
        depth: Nesting depth, 0 for the program's own outputs.
        optimizer: Class name of the optimizer, ``"manual"``, or ``""`` for the outermost level.
        trips: Number of trips of its loop (None: known at run time; 1: not in a loop).
        trains: Names of what it trains.
        reads: Names of meta-parameters that its loss or update reads.
        state: Number of values it carries besides what it trains (optimizer state, buffers).
        loc: Place of its gradient in the user's code.
        at: Where its gradients stand: for each, the positions of the equations that lead to it, outermost
            first.
        declared: The name that the user gave it with :func:`mlc.level`; empty without one.
        response: What was asked for there, as JSON (see :mod:`mlc.ir.lowered.responses`); empty: nothing.
    """

    name: str
    depth: int
    optimizer: str
    trips: int | None
    trains: tuple[str, ...]
    reads: tuple[str, ...]
    state: int
    loc: Loc | None
    at: tuple[tuple[int, ...], ...] = ()
    declared: str = ""
    response: str = ""

    @property
    def title(self) -> str:
        """The name that a reader knows it by: the declared one where there is one."""
        return self.declared or self.name


@dataclass(frozen=True)
class Flow:
    """A typed edge of the level graph.

    Attributes:
        kind: ``"value"`` (an upper level's parameter enters a lower loss or update), ``"response"`` (trained
            parameters enter an upper loss), ``"gradient"`` (a loss to what it trains), ``"stop"`` (cut).
        source: Level name or meta-parameter name.
        target: Level name.
        carries: Whether a derivative flows along it.
        loc: For stops, where the cut stands in the user's code.
        why: For stops, what makes the cut; for values, where they enter (the loss, the update, the start).
    """

    kind: str
    source: str
    target: str
    carries: bool = True
    loc: Loc | None = None
    why: str = ""


@dataclass(frozen=True, eq=False)
class Problem:
    """A traced function as data.

    Attributes:
        name: Name of the user's function.
        region: Its equations; the first ``n_outputs`` results are returned, the rest are final states.
        inputs: Meaning of the region's inputs.
        n_outputs: How many results the user's function returns.
        levels: See :class:`Level`.
        flows: See :class:`Flow`.
        notes: What a reader should know (what was not rolled, what is traced anew).
        loc: Where the function is defined.
        warnings: What the user is warned of when it is first called.
        guards: What a later call must find as it was, in words: decisions that Python took on numbers of tensors.
        binding: Run-time information of the tracer (not printed, not compared).
    """

    name: str
    region: Region
    inputs: tuple[Input, ...]
    n_outputs: int
    levels: tuple[Level, ...] = ()
    flows: tuple[Flow, ...] = ()
    notes: tuple[str, ...] = ()
    loc: Loc | None = None
    warnings: tuple[MlcWarning, ...] = ()
    guards: tuple[str, ...] = ()
    binding: Any = field(default=None, repr=False)

    def region_at(self, path: Sequence[int]) -> Region:
        """The region that these positions of loops lead to, outermost first."""
        region = self.region
        for i in path:
            op = region.eqns[i].op
            assert isinstance(op, Loop)
            region = op.body
        return region

    def places(self, level: Level) -> list[tuple[Region, Eqn]]:
        """The gradients of a level, each with the region that it stands in."""
        regions = [(self.region_at(path[:-1]), path[-1]) for path in level.at]
        return [(region, region.eqns[i]) for region, i in regions]

    @property
    def metas(self) -> tuple[int, ...]:
        """Positions of the meta-parameters among the inputs."""
        return tuple(i for i, x in enumerate(self.inputs) if x.role == "meta")

    @property
    def handed(self) -> frozenset[int]:
        """Positions of results that become the user's when a call is over: not those that are copied or read only."""
        return getattr(self.binding, "handed", frozenset(range(self.n_outputs)))
