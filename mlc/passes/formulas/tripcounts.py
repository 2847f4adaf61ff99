"""Trip counts as variables: which loops run equally often, and the same graphs with other numbers of trips.

A loop of the user's turns up several times in lowered stages: the sweep, its adjoint, what pushes tangents.  They
share one number of trips because they share sequences, or stand for the same line.  :class:`Trips` finds these
groups by union-find over sequences; :meth:`Trips.at` gives the graphs at other counts, which changes lengths of
sequences and nothing else.  Loops whose sequences are packed from single values keep their count.  O(equations).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mlc.ir.builder import renamed
from mlc.ir.core import Eqn, Loop, Pack, Region, Var
from mlc.ir.lowered.stages import Stages
from mlc.ir.types import Loc, SeqType, Type

__all__ = ["Group", "Trips", "planned_for"]

_USERS = ("train", "loop")  # labels of loops that the user wrote


@dataclass(frozen=True)
class Group:
    """Loops that run equally often.

    Attributes:
        count: How often now.
        loc: Where the user's loop stands.
        depth: In how many loops of the user's.
        least: Fewest trips at which the graphs cost what a formula says (as many as there are sets of states).
        open: Whether the number is known only at run time.
    """

    count: int
    loc: Loc | None
    depth: int
    least: int
    open: bool


class _Find:
    """Union-find over numbers of trips."""

    def __init__(self) -> None:
        self.up: list[int] = []
        self.levels: dict[Var, tuple[int, ...]] = {}

    def new(self) -> int:
        self.up.append(len(self.up))
        return len(self.up) - 1

    def root(self, i: int) -> int:
        while self.up[i] != i:
            self.up[i] = i = self.up[self.up[i]]
        return i

    def join(self, a: Sequence[int], b: Sequence[int]) -> None:
        for x, y in zip(a, b, strict=True):
            self.up[self.root(x)] = self.root(y)

    def of(self, v: Var) -> tuple[int, ...]:
        """One number per level of nesting of a sequence, the outermost first."""
        if v not in self.levels:
            t: Type = v.type
            made = []
            while isinstance(t, SeqType):
                made.append(self.new())
                t = t.elem
            self.levels[v] = tuple(made)
        return self.levels[v]


class Trips:
    """Groups of loops in some regions that share values.

    Args:
        regions: Regions with all loops (stages of one program, or a program's own region).
        same: Pairs of values that are one sequence.
    """

    def __init__(self, regions: Sequence[Region], same: Sequence[tuple[Var, Var]] = ()) -> None:
        self.regions = tuple(regions)
        self._find = _Find()
        self._loops: list[tuple[Eqn, int, tuple[int, ...]]] = []  # with its number, and those of loops around it
        self._number: dict[int, int] = {}
        self._packed: list[int] = []
        for a, b in same:
            self._find.join(self._find.of(a), self._find.of(b))
        for r in self.regions:
            self._region(r, ())
        self._lines()
        self.groups: dict[int, Group] = self._groups()

    @classmethod
    def of(cls, stages: Stages) -> Trips:
        """Groups of both stages."""
        if stages.backward is None:
            return cls([stages.forward])
        pairs = zip(stages.backward.inputs, stages.saved, strict=False)
        same = [(v, stages.forward.outputs[i]) for v, (kind, i) in pairs if kind == "out"]
        return cls([stages.forward, stages.backward], same)

    # ---- finding groups

    def _region(self, r: Region, around: tuple[int, ...]) -> None:
        find = self._find
        for e in r.eqns:
            if isinstance(e.op, Loop):
                self._loop(e, around)
            elif isinstance(e.op, Pack):
                self._packed.append(find.of(e.outs[0])[0])
                for v in e.args:
                    find.join(find.of(v), find.of(e.outs[0])[1:])
            else:
                seqs = [v for v in (*e.inputs, *e.outs) if isinstance(v.type, SeqType)]
                shown = len(e.inputs) == len(e.outs)  # an alias, or a stop, of a sequence
                for a, b in pairwise(seqs):
                    if shown and a.type == b.type:
                        find.join(find.of(a), find.of(b))

    def _loop(self, e: Eqn, around: tuple[int, ...]) -> None:
        op, find = e.op, self._find
        assert isinstance(op, Loop)
        own = self._number[id(e)] = find.new()
        split = op.n_carry + op.n_const
        for i, (a, v) in enumerate(zip(e.args, op.body.inputs, strict=True)):
            outer, inner = find.of(a), find.of(v)
            if i < split:
                find.join(outer, inner)
            else:
                find.join(outer, (own, *inner))
        self._loops.append((e, own, around))
        within = (*around, own) if _base(op) in _USERS else around
        self._region(op.body, within)
        if op.replay is not None:
            self._region(op.replay.body, within)
        for i, (o, v) in enumerate(zip(e.outs, op.body.outputs, strict=True)):
            find.join(find.of(o), find.of(v) if i < op.n_carry else (own, *find.of(v)))

    def _lines(self) -> None:
        """The user's loop of one line, in however many forms, has one number of trips; a loop around it has its own."""
        first: dict[tuple[object, ...], list[int]] = {}
        for e, own, around in self._loops:
            assert isinstance(e.op, Loop)
            if e.loc is None or _base(e.op) not in _USERS:
                continue
            outer = {self._find.root(n) for n in around}
            seen = first.setdefault((e.loc, e.op.trips, e.op.usual), [])
            same = next((n for n in seen if self._find.root(n) not in outer), None)
            if same is None:
                seen.append(own)
            else:
                self._find.join([own], [same])

    def _groups(self) -> dict[int, Group]:
        fixed = {self._find.root(i) for i in self._packed}
        out: dict[int, Group] = {}
        for e, own, around in self._loops:
            op, key, depth = e.op, self._find.root(own), len(around)
            assert isinstance(op, Loop)
            if key in fixed:
                continue
            least = 2 if op.replay is None else max(2, op.replay.slots)
            mine = _base(op) in _USERS
            loc = e.loc if mine and e.loc is not None else None
            known = out.get(key)
            if known is None:
                out[key] = Group(op.count, loc, depth, least, op.trips is None)
            else:
                at = known.loc or loc
                out[key] = replace(known, loc=at, depth=min(depth, known.depth), least=max(least, known.least))
        named = {k: g for k, g in out.items() if any(self._find.root(n) == k and _base(e.op) in _USERS
                                                     for e, n, _ in self._loops)}  # fmt: skip
        return dict(sorted(named.items(), key=lambda x: x[1].depth))

    def group(self, e: Eqn) -> int | None:
        """The group of a loop equation; None for one whose count is not the user's to change."""
        key = self._find.root(self._number[id(e)])
        return key if key in self.groups else None

    # ---- other counts

    def at(self, counts: Mapping[int, int]) -> tuple[Region, ...]:
        """The regions with other numbers of trips, by group."""
        env: dict[Var, Var] = {}
        return tuple(self._rewritten(r, env, counts) for r in self.regions)

    def _lengthened(self, v: Var, counts: Mapping[int, int]) -> Type:
        """The type of a value at these counts."""
        keys = [self._find.root(i) for i in self._find.of(v)]
        return _with_counts(v.type, [counts.get(k) for k in keys])

    def _value(self, v: Var, env: dict[Var, Var], counts: Mapping[int, int]) -> Var:
        if isinstance(v.type, SeqType) and v not in env:
            t = self._lengthened(v, counts)
            env[v] = v if _counts(t) == _counts(v.type) else Var(t)
        return env.get(v, v)

    def _rewritten(self, r: Region, env: dict[Var, Var], counts: Mapping[int, int]) -> Region:
        inputs = tuple(self._value(v, env, counts) for v in r.inputs)
        eqns = [self._equation(e, env, counts) for e in r.eqns]
        outputs = tuple(env.get(v, v) for v in r.outputs)
        if all(a is b for a, b in zip(eqns, r.eqns, strict=True)) and inputs == r.inputs and outputs == r.outputs:
            return r
        return Region(inputs, tuple(eqns), outputs, r.names)

    def _equation(self, e: Eqn, env: dict[Var, Var], counts: Mapping[int, int]) -> Eqn:
        if isinstance(e.op, Loop):
            e = self._with_loop(e, e.op, env, counts)
        outs = tuple(self._value(v, env, counts) for v in e.outs)
        e = _renamed(e, env)
        return e if outs == e.outs else e.with_(outs=outs)

    def _with_loop(self, e: Eqn, op: Loop, env: dict[Var, Var], counts: Mapping[int, int]) -> Eqn:
        body = self._rewritten(op.body, env, counts)
        replay = op.replay
        if replay is not None:
            again = self._rewritten(replay.body, env, counts)
            replay = replay if again is replay.body else replace(replay, body=again)
        n = counts.get(self._find.root(self._number[id(e)]))
        if n is None or n == op.count:
            same = body is op.body and replay is op.replay
            return e if same else e.with_(op=replace(op, body=body, replay=replay))
        trips, usual = (None, n) if op.trips is None else (n, op.usual)
        return e.with_(op=replace(op, body=body, replay=replay, trips=trips, usual=usual))


def _renamed(e: Eqn, env: dict[Var, Var]) -> Eqn:
    """The equation on the new values (most read no sequence and stay as they are)."""
    if not any(isinstance(v.type, SeqType) or env.get(v, v) is not v for v in e.inputs):
        return e
    changed = {v: env[v] for v in e.inputs if env.get(v, v) is not v}
    return renamed(e, changed)


def _base(op: object) -> str:
    """What a loop was in the user's program: ``"train"`` for its adjoint and its tangents too."""
    return op.label if isinstance(op, Loop) else ""


def _counts(t: Type) -> list[int]:
    return [t.count, *_counts(t.elem)] if isinstance(t, SeqType) else []


def _with_counts(t: Type, counts: Sequence[int | None]) -> Type:
    if not isinstance(t, SeqType):
        return t
    elem, n = _with_counts(t.elem, counts[1:]), counts[0]
    if n is None:
        return replace(t, elem=elem)
    return SeqType(elem, None, n) if t.length is None else SeqType(elem, n, t.usual)


def planned_for(region: Region, longer: Callable[[Group], int]) -> Region:
    """A region whose open loops are to be planned for other numbers of trips.

    Args:
        region: A program's region.
        longer: The number of trips to plan for, by open group.
    """
    trips = Trips([region])
    (new,) = trips.at({k: longer(g) for k, g in trips.groups.items() if g.open})
    return new
