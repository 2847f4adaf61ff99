"""The value graph: which value enters which other one, over all loop bodies of a region at once.

An edge goes from each input of an equation to each result; into a loop body (argument to body input), out
of it (body output to loop result), and from each carried body output back to its body input. Questions
about reachability are answered for many sources at once, with one bit per source: a pass over the edges
costs O(edges), and back edges need two or three passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mlc.ir.core import Custom, Eqn, Grad, Loop, Region, Stop, Var

__all__ = ["Edge", "GradSite", "ValueGraph"]


@dataclass(frozen=True, slots=True)
class Edge:
    """``source`` enters ``target``.

    Attributes:
        kind: ``"op"``, ``"stop"``, ``"grad"`` (inputs of a gradient to its results), ``"blind"`` (a value
            without derivative: random operators, the recorded half of a custom function), ``"enter"``,
            ``"leave"``, ``"back"``.
    """

    source: Var
    target: Var
    kind: str
    eqn: Eqn


@dataclass(frozen=True, eq=False)
class GradSite:
    """A gradient in a program.

    Attributes:
        eqn: The equation.
        at: Positions of the equations that lead to it, outermost first.
        region: The region in which it stands.
        loops: The loops around it, outermost first.
    """

    eqn: Eqn
    at: tuple[int, ...]
    region: Region
    loops: tuple[Eqn, ...]

    @property
    def losses(self) -> tuple[Var, ...]:
        """What is differentiated."""
        assert isinstance(self.eqn.op, Grad)
        return self.eqn.args[: self.eqn.op.n_loss]

    @property
    def wrt(self) -> tuple[Var, ...]:
        """What it is differentiated by."""
        assert isinstance(self.eqn.op, Grad)
        return self.eqn.args[self.eqn.op.n_loss : self.eqn.op.n_loss + self.eqn.op.n_wrt]


class ValueGraph:
    """All values of a region and of the loop bodies in it.

    Attributes:
        edges: In program order.
        grads: Every gradient.
        producer: The equation that defines a value (none for inputs).
        entry: For a body input: its loop, and its position.
        users: Equations that read a value.
        home: The region in which a value is defined.
        position: Its place among all values, in program order.
        stops: Every stop that holds for the hypergradient.
    """

    def __init__(self, region: Region) -> None:
        self.edges: list[Edge] = []
        self.grads: list[GradSite] = []
        self.producer: dict[Var, Eqn] = {}
        self.entry: dict[Var, tuple[Eqn, int]] = {}
        self.users: dict[Var, list[Eqn]] = defaultdict(list)
        self.stops: list[Eqn] = []
        self.home: dict[Var, Region] = {}
        self.position: dict[Var, int] = {}
        self._read(region, (), ())

    def _read(self, region: Region, at: tuple[int, ...], loops: tuple[Eqn, ...]) -> None:
        self.home.update((v, region) for v in region.inputs)
        for i, e in enumerate(region.eqns):
            self.home.update((v, region) for v in e.outs)
            self.position.update((v, len(self.position)) for v in e.outs)
            for v in dict.fromkeys(e.inputs):
                self.users[v].append(e)
            self.producer.update((v, e) for v in e.outs)
            if isinstance(e.op, Loop):
                self._loop(e, e.op, (*at, i), loops)
                continue
            if isinstance(e.op, Grad):
                self.grads.append(GradSite(e, (*at, i), region, loops))
            elif _kind(e) == "stop":
                self.stops.append(e)
            seen = set(e.args[: e.op.n_in]) if isinstance(e.op, Custom) else set()
            for v in dict.fromkeys(e.inputs):
                kind = _kind(e)
                if isinstance(e.op, Custom):
                    kind = "op" if v in seen else "blind"
                self.edges += [Edge(v, o, kind, e) for o in e.outs]

    def _loop(self, e: Eqn, op: Loop, at: tuple[int, ...], loops: tuple[Eqn, ...]) -> None:
        for i, (a, v) in enumerate(zip(e.args, op.body.inputs, strict=True)):
            self.entry[v] = (e, i)
            self.edges.append(Edge(a, v, "enter", e))
        self._read(op.body, at, (*loops, e))
        for i, (v, o) in enumerate(zip(op.body.outputs, e.outs, strict=True)):
            if i < op.n_carry:
                self.edges.append(Edge(v, op.body.inputs[i], "back", e))
            self.edges.append(Edge(v, o, "leave", e))

    def spread(self, seeds: Mapping[Var, int], *, without: Collection[str] = (), walls: Collection[Var] = (),
               free: bool = False, backward: bool = False) -> dict[Var, int]:  # fmt: skip
        """For every value, the union of the seeds that reach it.

        Args:
            seeds: One bit (or several) per source value.
            without: Kinds of edges not to follow.
            walls: Values that are reached but not passed; their own seeds leave them.
            free: Only along edges that carry a derivative.
            backward: Against the edges.
        """
        skip = {*without, *(("stop", "blind") if free else ())}
        edges: Iterable[Edge] = [
            x for x in self.edges if x.kind not in skip and not (free and not x.target.type.is_float)
        ]
        pairs = [(x.target, x.source) for x in reversed(list(edges))] if backward else [
            (x.source, x.target) for x in edges
        ]  # fmt: skip
        mask = dict(seeds)
        changed = True
        while changed:
            changed = False
            for a, b in pairs:
                m = seeds.get(a, 0) if a in walls else mask.get(a, 0)
                old = mask.get(b, 0)
                if m | old != old:
                    mask[b] = m | old
                    changed = True
        return mask


def _kind(e: Eqn) -> str:
    if isinstance(e.op, Stop) and not e.op.inner:
        return "stop"  # inner ones let the hypergradient pass
    if isinstance(e.op, Grad):
        return "grad"
    return "blind" if e.impure else "op"
