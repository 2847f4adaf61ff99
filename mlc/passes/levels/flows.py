"""Levels and flows of a program: what trains what, what enters where, which edges carry a derivative.

Steps (:mod:`mlc.ir.levels.steps`) that train the same values are one level.  A level is nested in another when its
gradients lie between what the other trains and the other's loss. Flows are found by reachability in the
value graph in which every update is a wall: what reaches a loss, an update or a starting point without
passing through another level's update enters there directly. With one bit per meta-parameter and level, all
of it takes a few passes over the edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx

from mlc.ir.core import Eqn, Grad, Loop, Stop, Var
from mlc.ir.levels.steps import Origins, Step, find_steps
from mlc.ir.levels.valuegraph import ValueGraph
from mlc.ir.origin import Origin
from mlc.ir.program import Flow, Level, Program
from mlc.ir.types import Loc

__all__ = ["find_levels"]

_WHERE = ("loss", "update", "start")


@dataclass(eq=False)
class _Group:
    """Steps that train the same values."""

    steps: list[Step]
    names: list[str]
    above: list[_Group] = field(default_factory=list)
    name: str = ""
    depth: int = 1

    @property
    def own(self) -> set[Var]:
        """Everything that holds a trained value: before and after a step."""
        return {x for s in self.steps for v, after, _, _ in s.trained for x in (v, after)}

    @property
    def declared(self) -> str:
        """The name that the user gave it."""
        return _declared(self.steps[0])

    @property
    def zone(self) -> set[Var]:
        return {v for s in self.steps for v in s.zone}


def find_levels(program: Program, steps: Sequence[Sequence[Any]]) -> tuple[tuple[Level, ...], tuple[Flow, ...]]:
    """Levels by nesting of gradients, and the flows between them.

    Args:
        program: A rolled program.
        steps: Of every optimizer step recorded: class name and place.

    Returns:
        Levels, L0 (the program's own result) first; flows.
    """
    graph = ValueGraph(program.region)
    groups = _groups(program, graph)
    flows = _Flows(program, graph, groups).find()
    top = Level(
        "L0",
        0,
        "",
        1,
        tuple(program.inputs[i].name for i in program.metas),
        _reads("L0", flows),
        0,
        program.loc,
    )
    levels = [_level(g, groups, graph, steps, flows) for g in groups]
    return (top, *levels), tuple(flows)


def _reads(level: str, flows: Iterable[Flow]) -> tuple[str, ...]:
    """Meta-parameters that enter a level; levels' names are no inputs' names here."""
    found = [f.source for f in flows if f.kind == "value" and f.target == level and f.why != _BETWEEN]
    return tuple(dict.fromkeys(found))


_BETWEEN = "trained above"


# ---- grouping


def _groups(program: Program, graph: ValueGraph) -> list[_Group]:
    found = find_steps(graph)
    names = [x.name for x in program.inputs]
    origins = Origins(graph, dict(zip(program.region.inputs, names, strict=True)))
    metas = {program.inputs[i].name for i in program.metas}
    inside = _nesting(graph, found)
    groups: list[_Group] = []
    for k, s in enumerate(found):
        mine = list(dict.fromkeys(origins.of(v) for v, _, _, _ in s.trained))
        mine = [n + "'" if n in metas else n for n in mine]
        for g in groups:
            apart = any((k, found.index(x)) in inside or (found.index(x), k) in inside for x in g.steps)
            if not apart and set(mine) & set(g.names) and _declared(s) == g.declared:
                g.steps.append(s)
                g.names += [n for n in mine if n not in g.names]
                break
        else:
            groups.append(_Group([s], mine))
    index = {s: k for k, s in enumerate(found)}
    for g in groups:
        g.above = [
            h for h in groups
            if h is not g and any((index[a], index[b]) in inside for a in g.steps for b in h.steps)
        ]  # fmt: skip
    _depths(groups)
    groups.sort(key=lambda g: (g.depth, found.index(g.steps[0])))
    for i, g in enumerate(groups):
        g.name = f"L{i + 1}"
        taken = {n for h in g.above for n in h.names}
        g.names = [n + "'" if n in taken else n for n in g.names]
    return groups


def _declared(step: Step) -> str:
    op = step.site.eqn.op
    assert isinstance(op, Grad)
    return op.level


def _depths(groups: Sequence[_Group]) -> None:
    """Levels from the top down to each; the players of a game stand above each other, and share their depth."""
    nested: Any = nx.DiGraph()
    nested.add_nodes_from(groups)
    nested.add_edges_from((g, h) for g in groups for h in g.above)
    games = nx.condensation(nested)
    below: dict[int, int] = {}
    for k in reversed(list(nx.topological_sort(games))):
        below[k] = 1 + max((below[h] for h in games.successors(k)), default=0)
        for g in games.nodes[k]["members"]:
            g.depth = below[k]


def _nesting(graph: ValueGraph, steps: Sequence[Step]) -> set[tuple[int, int]]:
    """Pairs (inner, outer): the inner gradient lies between what the outer one is taken by and its loss."""
    after: dict[Var, int] = {}
    behind: dict[Var, int] = {}
    for k, s in enumerate(steps):
        for v in s.site.eqn.outs:
            after[v] = 1 << k
        for v, _, _, _ in s.trained:
            behind[v] = behind.get(v, 0) | 1 << k
    results = graph.spread(after, without=("back",))
    bases = graph.spread(behind, without=("back",))
    out: set[tuple[int, int]] = set()
    for b, outer in enumerate(steps):
        reaching = 0
        for v in outer.site.losses:
            reaching |= results.get(v, 0)
        for a, inner in enumerate(steps):
            if a != b and reaching >> a & 1 and any(bases.get(v, 0) >> b & 1 for v in inner.site.losses):
                out.add((a, b))
    return out


# ---- levels


def _level(g: _Group, groups: Sequence[_Group], graph: ValueGraph, steps: Sequence[Sequence[Any]],
           flows: Sequence[Flow]) -> Level:  # fmt: skip
    places = [e.loc for v in g.zone if (e := graph.producer.get(v)) is not None and e.origin is Origin.UPDATE]
    loc = g.steps[0].site.eqn.loc
    return Level(
        g.name, g.depth, _optimizer(places, steps), _trips(g, graph), tuple(g.names), _reads(g.name, flows),
        _state(g, groups, graph, {str(x) for x in places}), loc, tuple(s.site.at for s in g.steps), g.declared,
    )  # fmt: skip


def _optimizer(places: Sequence[Loc | None], steps: Sequence[Sequence[Any]]) -> str:
    """Class of the optimizer whose step the update is, by place."""
    if not places:
        return "manual"
    lines = {(x.file, x.line) for x in places if x is not None}
    there = [s for s in steps if s[1] is not None and (s[1].file, s[1].line) in lines] or list(steps)
    kinds = sorted({str(s[0]) for s in there})
    return " or ".join(kinds) if kinds else "manual"


def _trips(g: _Group, graph: ValueGraph) -> int | None:
    """Steps of the level from a start to its end: those of a loop, and those peeled off."""
    breaks = [s.site.at for h in g.above for s in h.steps]
    ends: dict[Var, tuple[int, tuple[int, ...]]] = {}
    for s in g.steps:
        before, after, loop, i = s.trained[0]
        trips: int | None = 1
        if loop is not None and isinstance(loop.op, Loop):
            before, after, trips = loop.args[i], loop.outs[i], loop.op.trips
        if trips is None:
            return None
        source = graph.producer.get(before)
        if source is not None and isinstance(source.op, Stop):
            before = source.args[0]  # a step seen by gradients at its own depth
        if after not in ends:
            so_far, at = ends.get(before, (0, s.site.at))
            if any(at < x < s.site.at for x in breaks):
                so_far = 0  # the level above has stepped in between: a new run
            ends[after] = (so_far + trips, s.site.at)
    return max(n for n, _ in ends.values())


def _state(g: _Group, groups: Sequence[_Group], graph: ValueGraph, places: set[str]) -> int:
    """Values carried besides what is trained: optimizer state, and buffers if nobody else has them."""
    loop = next((x for s in g.steps for _, _, x, _ in s.trained if x is not None), None)
    if loop is None or not isinstance(loop.op, Loop):
        return 0
    op = loop.op
    sharing = [h for h in groups if any(x is loop for s in h.steps for _, _, x, _ in s.trained)]
    trained = {i for h in sharing for s in h.steps for _, _, x, i in s.trained if x is loop}
    bits = {h.name: {v for s in h.steps for v in s.site.eqn.outs} for h in sharing}
    marks = {v: 1 << k for k, h in enumerate(sharing) for v in bits[h.name]}
    reached = graph.spread(marks, without=("back", "grad"))
    me = 1 << sharing.index(g)
    count = 0
    for i in range(op.n_carry):
        after = op.body.outputs[i]
        before = op.body.inputs[i]
        if i in trained or after is before or not graph.users[before]:
            continue
        e = graph.producer.get(after)
        by = reached.get(after, 0)
        if (
            by & me
            or (not by and e is not None and str(e.loc) in places and e.origin is Origin.UPDATE)
            or (not by and (e is None or e.origin is not Origin.UPDATE) and g is sharing[0])
        ):
            count += 1
    return count


# ---- flows


class _Flows:
    """Reachability of losses, updates and starts from meta-parameters and from what levels train."""

    def __init__(self, program: Program, graph: ValueGraph, groups: Sequence[_Group]) -> None:
        self.program = program
        self.graph = graph
        self.groups = groups
        region = program.region
        self.sources: list[tuple[str, set[Var]]] = [(program.inputs[i].name, {region.inputs[i]}) for i in program.metas]
        self._cache: dict[tuple[int, str, str], int] = {}
        self.n_meta = len(self.sources)
        self.sources += [(g.name, g.own) for g in groups]
        self.walls = {v for g in groups for v in g.zone | g.own}
        self.targets: list[tuple[str, dict[str, set[Var]]]] = [
            ("L0", {"loss": set(region.outputs[: program.n_outputs])})
        ]
        for g in groups:
            losses = {v for s in g.steps for v in s.site.losses}
            start = {v for s in g.steps for v, _, _, _ in s.trained}
            self.targets.append((g.name, {"loss": losses, "update": g.zone - start, "start": start}))

    def find(self) -> list[Flow]:
        seeds: dict[Var, int] = {}
        for k, (_, values) in enumerate(self.sources):
            for v in values:
                seeds[v] = seeds.get(v, 0) | 1 << k
        full = self.graph.spread(seeds, without=("grad",), walls=self.walls)
        free = self.graph.spread(seeds, without=("grad",), walls=self.walls, free=True)
        out = [f for g in self.groups for f in self._gradient(g)]
        for k in range(len(self.sources)):
            for name, parts in self.targets:
                out += self._edge(k, name, parts, full, free)
        return out + self._stops(seeds, full)

    def _edge(
        self, k: int, target: str, parts: dict[str, set[Var]], full: dict[Var, int], free: dict[Var, int]
    ) -> list[Flow]:
        source = self.sources[k][0]
        if source == target:
            return []

        def hit(masks: dict[Var, int], part: str) -> bool:
            own = self.sources[k][1] if part != "loss" and k >= self.n_meta else set()
            if own & parts.get(part, set()):
                return any(masks.get(v, 0) >> k & 1 for v in parts[part] if v not in own)
            return bool(self._reaching(masks, target, parts, part) >> k & 1)

        where = [part for part in _WHERE if hit(full, part)]
        if not where:
            return []
        carries = any(hit(free, part) for part in where)
        if k < self.n_meta:
            return [Flow("value", source, target, carries, why=" and ".join(where))]
        above = next((g.above for g in self.groups if g.name == target), [])
        if any(h.name == source for h in above):
            return [Flow("value", source, target, carries, why=_BETWEEN)]
        return [Flow("response", source, target, carries)]

    def _reaching(self, masks: dict[Var, int], target: str, parts: dict[str, set[Var]], part: str) -> int:
        """Bits of all sources that reach a part of a target."""
        key = (id(masks), target, part)
        if key not in self._cache:
            bits = 0
            for v in parts.get(part, ()):
                bits |= masks.get(v, 0)
            self._cache[key] = bits
        return self._cache[key]

    def _gradient(self, g: _Group) -> list[Flow]:
        """The gradient of a level, and the stops between it and what it trains."""
        seeds = {v: 1 for s in g.steps for v in s.site.eqn.outs}
        free = self.graph.spread(seeds, without=("grad", "back"), free=True)
        carries = any(free.get(after, 0) for s in g.steps for _, after, _, _ in s.trained)
        cut = [e for e in self.graph.stops if e.args[0] in g.zone and e.outs[0] in g.zone]
        gradient = [Flow("gradient", g.name, g.name, carries, g.steps[0].site.eqn.loc)]
        return gradient + [_stop(g.name, g.name, e) for e in _by_place(cut)]

    def _stops(self, seeds: dict[Var, int], full: dict[Var, int]) -> list[Flow]:
        """Every stop between a source and a target."""
        ends: dict[Var, int] = {}
        for j, (_, parts) in enumerate(self.targets):
            for values in parts.values():
                for v in values:
                    ends[v] = ends.get(v, 0) | 1 << j
        leads = self.graph.spread(ends, without=("grad",), walls=self.walls, backward=True)
        found: dict[tuple[str, str, str], Flow] = {}
        for e in self.graph.stops:
            v = e.args[0]
            coming = seeds.get(v, 0) if v in self.walls else full.get(v, 0)
            going = leads.get(e.outs[0], 0)
            for k, (source, _) in enumerate(self.sources):
                for j, (target, _) in enumerate(self.targets):
                    if coming >> k & 1 and going >> j & 1:
                        found.setdefault((source, target, str(e.loc)), _stop(source, target, e))
        return list(found.values())


def _stop(source: str, target: str, e: Eqn) -> Flow:
    return Flow("stop", source, target, False, e.loc, "detach() or no_grad()")


def _by_place(stops: Iterable[Eqn]) -> list[Eqn]:
    return list({str(e.loc): e for e in stops}.values())
