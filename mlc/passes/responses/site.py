"""Where a level stands in a program: its runs, each from a start of what it trains to an end.

A run is a list of equations of one region: loops that carry what the level trains, and the gradients of steps that
were peeled off them (a first step that makes optimizer state), in order.  A loop around them that carries the
parameters on belongs to the run as well, unless a level above steps in it: then each of its trips is a run of its own
(so is each task of a meta-learner).  Linear in the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.levels.steps import Origins, Step, find_steps
from mlc.ir.levels.valuegraph import ValueGraph
from mlc.ir.program import Level, Program

__all__ = ["Run", "Site", "Trained"]


@dataclass
class Trained:
    """One parameter of a run, in the run's region.

    Attributes:
        start: Its value before the first step.
        end: Its value after the last one.
        at: Its value before the last item of the run.
    """

    start: Var
    end: Var
    at: Var


@dataclass
class Run:
    """One training of a level.

    Attributes:
        path: Positions of the loops that lead to its region, outermost first.
        region: That region.
        items: Positions in it of the equations that hold the gradients, in order.
        steps: The gradients that train something.
        trained: What is trained.
        links: For each step and each position in what it trains, which one that is.
        together: Positions of gradients in straight code that are taken before what an earlier one trains is updated,
            with the position of that one: one step with several backward passes.
    """

    path: tuple[int, ...]
    region: Region
    items: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)
    links: list[tuple[Step, int, Trained]] = field(default_factory=list)
    together: dict[int, int] = field(default_factory=dict)

    def group(self, item: int) -> int:
        """The first item of the step that an item belongs to."""
        return self.together.get(item, item)

    @property
    def updates(self) -> list[Step]:
        """One gradient for each update: the last of those that it is fed by."""
        out, seen = list[Step](), set[Var]()
        for s in reversed(self.steps):
            made = {after for _, after, _, _ in s.trained}
            if not made <= seen:
                out.append(s)
            seen |= made
        return out[::-1]

    def eqn(self, item: int) -> Eqn:
        """The equation at a position of the region."""
        return self.region.eqns[item]


class Site:
    """The runs of one level.

    Attributes:
        program: The program.
        level: The level.
        graph: All values.
        runs: In order.
        moving: Values that depend on a meta-parameter, or on what another level trains: what a derivative is asked by.
        above: Steps of levels above: their gradients are taken of what this level trained.
        own: Values that depend on what the level itself trains.
    """

    def __init__(self, program: Program, level: Level, gradients: Sequence[Eqn]) -> None:
        """``gradients``: the level's gradient equations, by identity (positions may have moved)."""
        self.program = program
        self.level = level
        self.graph = ValueGraph(program.region)
        self.origins = Origins(self.graph)
        mine = {id(e) for e in gradients}
        every = find_steps(self.graph)
        self.steps = [s for s in every if id(s.site.eqn) in mine]
        self.others = [s for s in every if id(s.site.eqn) not in mine]
        metas = [program.region.inputs[i] for i in program.metas]
        trained = [x for s in self.others for v, after, _, _ in s.trained for x in (v, after)]
        self.moving = set(self.graph.spread({v: 1 for v in (*metas, *trained)}))
        self.own = set(self.graph.spread({v: 1 for s in self.steps for v, _, _, _ in s.trained}))
        self.above = [s for s in self.others if self._above(s)]
        self.runs: list[Run] = []
        for s in self.steps:
            self._place(s)

    def _above(self, s: Step) -> bool:
        """Whether a step is one of a level above: its gradient is taken of what this level trained."""
        seeds = {x: 1 for mine in self.steps for _, after, _, _ in mine.trained for x in [after]}
        reached = self.graph.spread(seeds, without=("back", "grad"))
        return any(reached.get(v, 0) for v in s.site.losses)

    def _place(self, s: Step) -> None:
        at = s.site.at
        path, ends = self._home(s)
        item = at[len(path)]
        run = self._continued(path, item, ends) or self._begun(path)
        if item not in run.items:
            if run.items and self._same_step(run, item):
                run.together[item] = run.group(run.items[-1])
            run.items.append(item)
        run.steps.append(s)
        for start, end in ends:
            here = self.origins.kept(start)
            known = next((t for t in run.trained if here in (self.origins.kept(t.end), t.at)), None)
            if known is None:
                known = Trained(start, end, here)
                run.trained.append(known)
            known.end, known.at = end, here
            run.links.append((s, len([x for x in run.links if x[0] is s]), known))

    def _home(self, s: Step) -> tuple[tuple[int, ...], list[tuple[Var, Var]]]:
        """Loops that lead to the region of the step's run, and start and end there of what it trains."""
        path, loops = s.site.at[:-1], list(s.site.loops)
        ends: list[tuple[Var, Var, int | None]] = []
        for before, after, loop, i in s.trained:
            ends.append((before, after, i if loop is not None else None))
        carrying = s.trained[0][2]
        if carrying is not None and self._stepped_above(carrying):  # a step of the level above in every trip of its
            k = next(j for j, x in enumerate(loops) if x is carrying) + 1
            return path[:k], [(self.root(a, b), b) for a, b, _ in ends]
        if carrying is None:
            k = self._depth_of(s.trained[0][1], loops)
            return path[:k], [(self.root(a, b), b) for a, b, _ in ends]
        k = next(j for j, x in enumerate(loops) if x is carrying)
        at = [i for _, _, i in ends if i is not None]
        while k > 0:
            outer = loops[k - 1]
            further = self._carried_by(outer, loops[k], at)
            if further is None or self._stepped_above(outer):
                break
            k, at = k - 1, further
        loop = loops[k]
        return path[:k], [(loop.args[i], loop.outs[i]) for i in at]

    def root(self, before: Var, after: Var) -> Var:
        """What a step trains, where its next value is made (its gradient may be taken in a loop in there)."""
        v, home = self.origins.kept(before), self.graph.home[after]
        while self.graph.home[v] is not home and v in self.graph.entry:
            loop, i = self.graph.entry[v]
            v = self.origins.kept(loop.args[i])
        return v

    def _depth_of(self, v: Var, loops: Sequence[Eqn]) -> int:
        """How many of these loops lead to the region in which a value is made."""
        home = self.graph.home[v]
        for j, x in enumerate(loops):
            assert isinstance(x.op, Loop)
            if x.op.body is home:
                return j + 1
        return 0

    def _carried_by(self, outer: Eqn, inner: Eqn, at: Sequence[int]) -> list[int] | None:
        """Which carries of a loop around these carries of a loop in it are; None when it makes them anew."""
        op = outer.op
        assert isinstance(op, Loop)
        out = []
        for i in at:
            start = self._first(self.origins.kept(inner.args[i]), op)
            entry = self.graph.entry.get(start)
            if entry is None or entry[0] is not outer or entry[1] >= op.n_carry:
                return None
            out.append(entry[1])
        return out

    def _first(self, v: Var, op: Loop) -> Var:
        """Back over steps that were peeled off inside the body."""
        ends = {self.origins.kept(after): before for s in self.steps for before, after, loop, _ in s.trained
                if loop is None and self.graph.home[after] is op.body}  # fmt: skip
        while v in ends:
            v = self.origins.kept(ends[v])
        return v

    def _stepped_above(self, loop: Eqn) -> bool:
        return any(loop in s.site.loops for s in self.above)

    def _continued(self, path: tuple[int, ...], item: int, ends: Sequence[tuple[Var, Var]]) -> Run | None:
        """The run that goes on with this item: what it trains starts where that run has got to."""
        for run in reversed(self.runs):
            if run.path != path:
                continue
            if item in run.items:
                return run
            between = any(s.site.at[: len(path)] == path and run.items[-1] < s.site.at[len(path)] < item
                          for s in self.above if len(s.site.at) > len(path))  # fmt: skip
            got = {self.origins.kept(t.end) for t in run.trained}
            if not between and any(self.origins.kept(start) in got for start, _ in ends):
                return run
            if not between and self._same_step(run, item):
                return run
        return None

    def _same_step(self, run: Run, item: int) -> bool:
        """Whether a gradient in straight code is taken before the run's last one has updated anything."""
        last = run.region.eqns[run.items[-1]]
        if isinstance(last.op, Loop) or isinstance(run.region.eqns[item].op, Loop):
            return False
        made = {v: i for i, e in enumerate(run.region.eqns) for v in e.outs}
        mine = [t.end for s, _, t in run.links if s.site.at[len(run.path)] == run.items[-1]]
        return bool(mine) and all(made.get(v, -1) > item for v in mine)

    def _begun(self, path: tuple[int, ...]) -> Run:
        run = Run(path, self.program.region_at(path))
        self.runs.append(run)
        return run
