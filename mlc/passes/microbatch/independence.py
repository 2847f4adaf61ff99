"""Do the examples of a batch meet?  A proof on the graph, equation by equation.

:func:`batchwise` looks for values that hold one example after another along some dimension, follows them through a
region by local rules (:mod:`mlc.passes.microbatch.rules`) and tells for every value whether it belongs to single
examples (``Shard``), is a sum over them (``SUM``), does not depend on them (``SAME``) or mixes them (``MIXED``).
Mixing is harmless before the examples enter the model (labels, weights and inputs normalised over the batch: computed
early, for all) and behind it (an optimizer step on summed gradients: computed late).  In between it is refused, and the
first equation where examples meet is named.  Unknown operators mix.  O(equations) per candidate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlc.ir.core import Alias, Custom, Eqn, Region, Stop, Var, map_vars
from mlc.ir.lowered.contract import Refused
from mlc.ir.types import SeqType, TensorType, nbytes
from mlc.passes.microbatch.dependence import MIXED, SAME, SUM, Dependence, Local, Shard, Site, shape_of
from mlc.passes.microbatch.rules import heavy, linear_rule, name_of, rule_for

__all__ = ["Analysis", "Placed", "Refused", "batchwise", "followed"]

_TRIALS, _MORE = 12, 8
_CONE = 200


@dataclass(frozen=True)
class Placed:
    """An equation of the batched part.

    Attributes:
        local: How it is written for a part of the batch.
        slices: Values that are the same for all, read in slices.
        whole: Values of the batched part that it reads as computed early, for all examples.
    """

    local: Local
    slices: dict[Var, Shard]
    whole: frozenset[Var]


@dataclass
class Analysis:
    """What was proved about a region.

    Attributes:
        region: The region, without equations that only rename values.
        n: Number of examples.
        seeds: Inputs that hold examples.
        kinds: Dependence of every value.
        placed: Equations of the batched part.
        early: Equations of the batched part that are also run for all examples before it.
        covered: Bytes of the values of single examples.
        emitted: Values of single examples that are read late.
    """

    region: Region
    n: int
    seeds: dict[Var, Shard]
    kinds: dict[Var, Dependence] = field(default_factory=dict)
    placed: dict[Eqn, Placed] = field(default_factory=dict)
    early: dict[Eqn, None] = field(default_factory=dict)
    covered: int = 0
    emitted: dict[Var, None] = field(default_factory=dict)

    @property
    def work(self) -> tuple[int, int]:
        """How much is done on single examples: heavy operators, bytes of values."""
        return sum(heavy(e.op) for e in self.placed), self.covered


def batchwise(region: Region, data: Sequence[Var] | None = None, parts: int = 1) -> Analysis | Refused:
    """Prove that examples do not meet between where they enter and where they are summed.

    Args:
        region: Equations without inner gradients.
        data: Inputs that may hold examples; all of them without.
        parts: Only batches that can be split into so many parts of equal size.
    """
    plain = _plain(region)
    values = (*plain.inputs, *[v for e in plain.eqns for v in e.outs])
    shapes = [shape_of(v) for v in values if isinstance(v.type, TensorType)]
    if any(0 in shape and len(shape) > 1 for shape in shapes):  # statistics that nobody asked for are (0,)
        return Refused("a tensor has no elements")
    best: Analysis | Refused = Refused("no input holds a batch of examples that reaches the results")
    for rows in _candidates(plain.inputs if data is None else data):
        for v, dim, n in rows:
            found = _grow(plain, n, {v: Shard(dim)})
            if isinstance(found, Analysis) and n % parts:
                found = Refused(
                    f"a batch of {n} examples cannot be split into {parts} equal parts", None, found.work, True
                )
            best = found if _rank(found) > _rank(best) else best
        if isinstance(best, Analysis) or (best.at is not None and best.work[0]):
            break  # examples were followed into a model: what these inputs say is final
    return best


def followed(region: Region, n: int, seeds: dict[Var, Shard]) -> Analysis | Refused:
    """The same for examples that are known to enter at these inputs of a region that :func:`batchwise` returned."""
    return _Sweep(region, n, seeds).run()


def _rank(a: Analysis | Refused) -> tuple[bool, tuple[int, int]]:
    """Proofs before refusals, more work before less; the first refusal from inside a model stands."""
    return (True, a.work) if isinstance(a, Analysis) else (False, (min(a.work[0], 1), 0 if a.work[0] else a.work[1]))


def _plain(region: Region) -> Region:
    """Without equations that give a value another name."""
    env: dict[Var, Var] = {}
    eqns = []
    for e in region.eqns:
        args = map_vars(e.args, lambda v: env.get(v, v))
        if isinstance(e.op, (Alias, Stop, Custom)):
            first = e.op.n_in if isinstance(e.op, Custom) else 0
            env.update(zip(e.outs, args[first:], strict=False))
        else:
            kwargs = tuple((k, map_vars(x, lambda v: env.get(v, v))) for k, x in e.kwargs)
            eqns.append(e.with_(args=args, kwargs=kwargs))
    return Region(region.inputs, tuple(eqns), tuple(env.get(v, v) for v in region.outputs), region.names)


def _candidates(inputs: Sequence[Var]) -> list[list[tuple[Var, int, int]]]:
    """Inputs, dimensions and numbers of examples to try, in groups: the first that leads into a model decides.

    Labels and tokens first, then inputs of a shape of their own (parameters come with states and cotangents of their
    shape); dimension 0 first.  A dimension may hold several entries per example (flattened tokens): sizes of other
    inputs that divide its size are tried, larger ones first.
    """
    tensors = [v for v in inputs if isinstance(v.type, TensorType)]
    shapes = [shape_of(v) for v in tensors]
    sizes = sorted({x for shape in shapes for x in shape if x > 1}, reverse=True)
    groups: dict[tuple[bool, ...], list[tuple[Any, tuple[Var, int, int]]]] = defaultdict(list)
    for i, v in enumerate(tensors):
        for d, size in enumerate(shape_of(v)):
            for n in sizes:
                if size % n == 0:
                    key = (v.type.is_float, n < size, v.type.is_float and d > 0)
                    groups[key].append(((d > 0, shapes.count(shape_of(v)), i, -n), (v, d, n)))
    return [[row for _, row in sorted(groups[k], key=lambda r: r[0])[:_TRIALS]] for k in sorted(groups)]


def _grow(region: Region, n: int, seeds: dict[Var, Shard]) -> Analysis | Refused:
    """Follow the seeds; inputs that are read in slices, or lie behind what is, become seeds too."""
    sweep = _Sweep(region, n, seeds)
    found = sweep.run()
    if isinstance(found, Refused):
        return _earliest(found, sweep.a)
    refused: Refused | None = None
    for _ in range(_TRIALS):
        if isinstance(found, Refused):
            return found
        larger = None
        for more in _more(found):
            tried = _Sweep(region, n, {**found.seeds, **more}).run()
            if isinstance(tried, Analysis) and tried.covered > found.covered:
                larger = tried
                break
            if isinstance(tried, Refused) and (refused is None or tried.work > refused.work):
                refused = tried
        if larger is None:
            break
        found = larger
    return found if isinstance(found, Refused) else _judged(found, refused)


def _earliest(refused: Refused, a: Analysis) -> Refused:
    """The first place where examples meet: from labels alone it may be seen in the backward pass only."""
    tried = [_Sweep(a.region, a.n, {**a.seeds, **more}).run() for more in _more(a)]
    return min([refused, *(r for r in tried if isinstance(r, Refused) and r.work[0])], key=lambda r: r.at or 0)


def _judged(a: Analysis, refused: Refused | None) -> Analysis | Refused:
    """Refuse when a model works on single examples in one piece, or on none."""
    if not a.work[0]:
        return refused or Refused("no work of a model is done on single examples", None, (0, a.covered))
    modelled: set[Var] = set()
    constant: set[Var] = set()  # zeros and the like, which hold nobody's examples
    for e in a.region.eqns:
        if all(v in constant for v in e.inputs):
            constant.update(e.outs)
        if e in a.placed:
            continue
        if any(v in modelled for v in e.inputs) or (heavy(e.op) and not any(v in constant for v in e.inputs)):
            modelled.update(e.outs)
    for e, p in a.placed.items():
        if any(v in modelled for v in p.slices):
            return refused or Refused("examples enter a model in one piece", e.loc, a.work)
    return a


def _more(a: Analysis) -> list[dict[Var, Shard]]:
    """Seeds to add: inputs that are read in slices; or one of those behind what is read in slices."""
    asked = {v: c for p in a.placed.values() for v, c in p.slices.items()}
    producer = {v: e for e in a.region.eqns for v in e.outs}
    inputs = set(a.region.inputs) - set(a.seeds)
    direct = {v: c for v, c in asked.items() if v in inputs}
    out = [direct] if len(direct) > 1 else []
    out += [{v: c} for v, c in direct.items()]
    behind = dict.fromkeys(v for v in asked if v not in a.seeds)
    todo = list(behind)
    while todo:
        e = producer.get(todo.pop())
        new = [v for v in (e.inputs if e is not None else ()) if v not in behind]
        behind.update(dict.fromkeys(new))
        todo += new
    sized = [{v: Shard(d)} for v in behind if v in inputs for d, s in enumerate(shape_of(v)) if s == a.n]
    return (out + [x for x in sized if x not in out])[:_MORE]


class _Mixing(Exception):
    """Examples meet inside the model."""

    def __init__(self, origin: Eqn, here: Eqn) -> None:
        super().__init__()
        self.eqn = origin
        self.loc = origin.loc or here.loc


class _Sweep:
    """One pass over a region from given seeds."""

    def __init__(self, region: Region, n: int, seeds: dict[Var, Shard]) -> None:
        self.a = Analysis(region, n, seeds)
        self.kinds = self.a.kinds
        self.kinds.update((v, seeds.get(v, SAME)) for v in region.inputs)
        self.producer: dict[Var, Eqn] = {}
        self.origin: dict[Var, Eqn] = {}
        self.joined: set[Var] = set()  # late values that read single examples, together
        self.cheap: dict[Var, dict[Eqn, None] | None] = {}
        self.first: Eqn | None = None  # the first late equation that reads single examples, or why it is late
        self.room = 2 * sum(nbytes(v.type) for v in region.inputs if n in shape_of(v))

    def run(self) -> Analysis | Refused:
        """The analysis, or where examples meet."""
        try:
            for e in self.a.region.eqns:
                self.visit(e)
            self.finish()
        except _Mixing as m:
            reason = f"the examples of a batch of {self.a.n} meet in {name_of(m.eqn.op)}"
            return Refused(reason, m.loc, self.a.work, at=self.a.region.eqns.index(m.eqn))
        return self.a

    def visit(self, e: Eqn) -> None:
        """Dependence of the results of one equation."""
        self.producer.update((v, e) for v in e.outs)
        kinds = {self.kinds[v] for v in e.inputs}
        if kinds <= {SAME}:
            self.kinds.update((v, SAME) for v in e.outs)
            return
        if e.impure:
            raise _Mixing(e, e)
        if MIXED not in kinds and self.place(e, frozenset()):
            return
        known = [v for v in e.inputs if self.kinds[v] in (SUM, MIXED) and self.cone(v) is not None]
        if known and self.place(e, frozenset(known)):
            return
        if not self.whole(e):
            self.late(e)

    def place(self, e: Eqn, known: frozenset[Var]) -> bool:
        """Put an equation into the batched part, if its rule allows."""
        wanted = set(known)

        def kind(v: Var) -> Dependence:
            return SAME if v in known else self.kinds[v]

        def whole(v: Var) -> bool:
            if self.kinds[v] is SAME:
                return True
            wanted.add(v)
            return self.cone(v) is not None

        if any(kind(v) is MIXED for v in e.inputs):
            return False
        site = Site(e, self.a.n, kind, whole, self.producer.get)
        kinds = {kind(v) for v in e.inputs}
        rule = rule_for(e.op) if any(isinstance(k, Shard) for k in kinds) else linear_rule
        local = rule(site) if rule is not None and kinds != {SAME} else None
        if local is None:
            return False
        for v in wanted:
            self.a.early.update(self.cone(v) or {})
        self.a.placed[e] = Placed(local, site.slices, known)
        self.kinds.update(zip(e.outs, local.outs, strict=True))
        self.a.covered += sum(nbytes(v.type) for v, k in zip(e.outs, local.outs, strict=True) if isinstance(k, Shard))
        return True

    def cone(self, v: Var) -> dict[Eqn, None] | None:
        """Equations that compute ``v`` for all examples, in no order, when that is cheap (no model in them)."""
        if v not in self.cheap:
            self.cheap[v] = self._cone(v)
        return self.cheap[v]

    def _cone(self, v: Var) -> dict[Eqn, None] | None:
        out: dict[Eqn, None] = {}
        todo = [v]
        while todo:
            u = todo.pop()
            e = self.producer.get(u)
            if self.kinds[u] is SAME or e is None or e in out:
                continue
            large = sum(nbytes(x.type) for x in e.outs) > self.room
            if large or e.impure or heavy(e.op) or len(out) >= _CONE:
                return None
            out[e] = None
            todo += e.inputs
        return out

    def whole(self, e: Eqn) -> bool:
        """Compute an equation for all examples before the batch is split, when that is cheap."""
        if heavy(e.op) or any(isinstance(v.type, SeqType) for v in e.outs):
            return False
        if sum(nbytes(v.type) for v in e.outs) > self.room:
            return False
        cones = [self.cone(v) for v in e.inputs]
        if any(c is None for c in cones):
            return False
        for c in cones:
            self.a.early.update(c or {})
        self.kinds.update((v, SAME) for v in e.outs)
        return True

    def late(self, e: Eqn) -> None:
        """An equation behind the batched part: on sums anything, on single examples no work of a model."""
        mixed = [self.origin[v] for v in e.inputs if self.kinds[v] is MIXED]
        origin = mixed[0] if mixed else e
        shards = [v for v in e.inputs if isinstance(self.kinds[v], Shard)]
        joined = bool(shards) or any(v in self.joined for v in e.inputs)
        if joined and heavy(e.op):
            raise _Mixing(origin, e)
        if joined:
            self.joined.update(e.outs)
        self.a.emitted.update(dict.fromkeys(shards))
        for v in e.outs:
            self.kinds[v] = MIXED
            self.origin[v] = origin
        if shards and self.first is None:
            self.first = origin

    def finish(self) -> None:
        """What is read late must be small: no more than the examples themselves.  And there must be work to split."""
        read = sum(nbytes(v.type) for v in self.a.emitted)
        if read > self.room and self.first is not None:
            raise _Mixing(self.first, self.first)
