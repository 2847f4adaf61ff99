"""Other batch sizes: the stages of a plan as they would be for more or fewer examples, to see what one costs.

The same proof that allows micro-batches (:mod:`mlc.passes.microbatch.independence`) tells where examples stand in the
bodies of loops and how every equation is written for another number of them (:mod:`mlc.passes.microbatch.part`); here
the equations are written so and stay where they are.  Only for predictions: such stages are never run.  What lies
outside of loops (a validation loss) keeps its size.  O(equations) for each size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from torch._ops import OpOverload

from mlc.ir.builder import contiguous, dce, renamed
from mlc.ir.core import Eqn, Loop, Region, Var, aten
from mlc.ir.lowered.contract import Refused
from mlc.ir.lowered.stages import Stages
from mlc.ir.types import SeqType, TensorType, nbytes
from mlc.passes.cost.equations import flops
from mlc.passes.microbatch.dependence import PARTS, Shard, shape_of
from mlc.passes.microbatch.independence import Analysis, batchwise, followed
from mlc.passes.microbatch.part import FACTORIES, LABEL, Part, Unexpected
from mlc.record.retype import shared

__all__ = ["Batches"]

_MOST = 2500  # equations of stages that are looked at


class _Not(Exception):
    """The batch of these stages cannot be scaled."""


@dataclass(frozen=True)
class Batches:
    """Stages whose loops work on batches of independent examples.

    Attributes:
        stages: Of a plan.
        n: Examples in a batch.
        bodies: What was proved about each loop body.
    """

    stages: Stages
    n: int
    bodies: dict[int, Analysis]

    @staticmethod
    def of(stages: Stages) -> Batches | None:
        """The batches of these stages; None where examples meet, differ in number, or are split already."""
        regions = [stages.forward, *([stages.backward] if stages.backward is not None else [])]
        if sum(1 for r in regions for _ in r.walk()) > _MOST:
            return None
        bodies: dict[int, Analysis] = {}
        try:
            known: dict[Var, Shard] = {}
            for r in regions:
                _prove(r, bodies, known)
        except _Not:
            return None
        sizes = {a.n for a in bodies.values()}
        return Batches(stages, sizes.pop(), bodies) if len(sizes) == 1 else None

    def at(self, size: int) -> tuple[Stages, int] | None:
        """The stages for batches of ``size``, and the bytes of them that were not scaled; None when that cannot be.

        (What a loop computes for all examples at once and emits stays as large as it was.)
        """
        env: dict[Var, Var] = {}
        rewriter = _Rewriter(self, Fraction(self.n, size))
        try:
            forward = rewriter.around(self.stages.forward, env)
            backward = self.stages.backward
            made = replace(self.stages, forward=forward, backward=backward and rewriter.around(backward, env))
            whole = _closed(made.forward) and (made.backward is None or _closed(made.backward))
            return (made, rewriter.over) if whole else None
        except (_Not, Unexpected):
            return None


def _closed(region: Region) -> bool:
    """Whether every value that is read is an input or was made before, in loop bodies as well."""
    known = set(region.inputs)
    for e in region.eqns:
        if any(v not in known for v in e.inputs) or (isinstance(e.op, Loop) and not _closed(e.op.body)):
            return False
        known.update(e.outs)
    return all(v in known for v in region.outputs)


def _prove(region: Region, bodies: dict[int, Analysis], known: dict[Var, Shard]) -> None:
    """Prove every loop of a region; ``known`` tells where examples stand in sequences that loops have handed on."""
    for e in region.eqns:
        if not isinstance(e.op, Loop):
            continue
        if e.op.label == LABEL:
            raise _Not
        inputs = zip(e.op.body.inputs, e.args, strict=True)
        _body(e.op.body, {v: known[x] for v, x in inputs if x in known}, bodies)
        if e.op.replay is not None:
            _body(e.op.replay.body, {}, bodies)
        a = bodies.get(id(e.op.body))
        if a is None:
            continue
        ends = zip(e.outs, a.region.outputs, strict=True)
        known.update((o, k) for o, v in ends if isinstance(k := a.kinds[v], Shard))
        known.update((x, a.seeds[v]) for v, x in zip(e.op.body.inputs, e.args, strict=True) if v in a.seeds)


def _body(body: Region, seeds: dict[Var, Shard], bodies: dict[int, Analysis]) -> None:
    _prove(body, bodies, {})
    if not any(flops(e) for e in body.eqns):
        return
    if any(isinstance(e.op, Loop) for e in body.eqns):
        raise _Not  # examples of two levels
    found = batchwise(_lifted(body))
    if isinstance(found, Analysis):
        made = [v for v in found.region.inputs[len(body.inputs) :] if shape_of(v).count(found.n) == 1]
        constants = {v: Shard(shape_of(v).index(found.n)) for v in made}
        larger = followed(found.region, found.n, {**found.seeds, **seeds, **constants})
        found = larger if isinstance(larger, Analysis) else followed(found.region, found.n, {**found.seeds, **seeds})
    if isinstance(found, Refused):
        raise _Not
    bodies[id(body)] = found


def _constant(e: Eqn) -> bool:
    return e.op in FACTORIES and not e.inputs


def _lifted(body: Region) -> Region:
    """The body with constants (zeros of a batch) as further inputs, which may hold examples too."""
    made = tuple(e.outs[0] for e in body.eqns if _constant(e))
    return Region((*body.inputs, *made), tuple(e for e in body.eqns if not _constant(e)), body.outputs)


class _Scaled(Part):
    """One part of a batch, which may be larger than the whole: only types matter."""

    def pieces(self, v: Var, c: Shard) -> list[Var]:
        """The part of a value of all examples."""
        t = v.type
        assert isinstance(t, TensorType)
        shape = self.part_shape(v, c)
        return [Var(TensorType(t.dtype, shape, contiguous(shape), t.device))]


class _Rewriter:
    """Writes regions for another size of the batch: ``1 / k`` times what it is."""

    def __init__(self, batches: Batches, k: Fraction) -> None:
        self.batches, self.k = batches, k
        self.retyper = shared()
        self.made: set[Var] = set()  # slices that were written
        self.emitted: set[Var] = set()
        self.over = 0

    def around(self, region: Region, env: dict[Var, Var]) -> Region:
        """A region that is not about examples itself, but has loops that may be."""
        eqns = [self.loop(e, e.op, env) if isinstance(e.op, Loop) else renamed(e, env) for e in region.eqns]
        inputs = tuple(env.get(v, v) for v in region.inputs)
        return Region(inputs, tuple(eqns), tuple(env.get(v, v) for v in region.outputs), region.names)

    def loop(self, e: Eqn, op: Loop, env: dict[Var, Var]) -> Eqn:
        args = tuple(env.get(v, v) for v in e.args)
        body = self.body(op.body)
        for a, old, v in zip(args, e.args, body.inputs, strict=True):
            assert a is not None
            if _elem(a) != _elem(v):
                if a is not old:
                    raise _Not  # what one loop emits for each example, another reads for all
                self.over += abs(_bytes(a) - _bytes(v)) * op.count if a in self.emitted else 0
        replay = op.replay
        if replay is not None:
            replay = replace(replay, body=self.body(replay.body))
        outs = []
        for i, v in enumerate(e.outs):
            made = body.outputs[i].type
            t = made if i < op.n_carry else op.sequence(made)
            outs.append(v if t == v.type else Var(t))
        env.update((v, o) for v, o in zip(e.outs, outs, strict=True) if v is not o)
        self.emitted.update(outs)
        return e.with_(op=replace(op, body=body, replay=replay), args=args, outs=tuple(outs))

    def body(self, body: Region) -> Region:
        a = self.batches.bodies.get(id(body))
        return self.around(body, {}) if a is None else self.fewer(body, a)

    def fewer(self, body: Region, a: Analysis) -> Region:
        """A body for another size of its batch."""
        part = _Scaled(a, self.k, self.retyper)  # type: ignore[arg-type]  # sizes are divided by it, no more
        out: list[Eqn] = []
        env: dict[Var, Var] = {}  # what stands for values that are not of single examples
        for e in a.region.eqns:
            p = a.placed.get(e)
            if p is None or e in a.early:
                out.append(self.late(e, {**part.env, **env}))
                env.update((v, o) for v, o in zip(e.outs, out[-1].outs, strict=True) if v is not o)
            if p is not None:
                mean = p.local.divide == PARTS
                out += p.local.early
                part.run(e, replace(p, local=replace(p.local, divide=None)) if mean else p)
                out += self.entering(a, part)
                out += part.eqns
                part.eqns.clear()
        names = {c: v for v, c in part.consts.items()}
        names.update((x, env.get(v, v)) for x, v in list(names.items()))
        cut = {v: x for (v, _), (x, _) in part.seqs.items()}
        inputs = tuple(cut.get(v, v) for v in body.inputs)
        for e in body.eqns:
            if _constant(e):
                e = self.constant(e, cut.get(e.outs[0]))
                at = next((i for i, x in enumerate(out) if e.outs[0] in x.inputs), len(out))
                out.insert(at, e)
        results = {**part.env, **env, **{v: x for v, x in cut.items() if v in a.region.inputs}}
        ends = tuple(results.get(v, v) for v in a.region.outputs)
        return dce(Region(inputs, tuple(renamed(e, names) for e in out), ends))

    def constant(self, e: Eqn, smaller: Var | None) -> Eqn:
        """A constant, for a part of the examples where it is read so."""
        return e if smaller is None else e.with_(args=(list(shape_of(smaller)), *e.args[1:]), outs=(smaller,))

    def entering(self, a: Analysis, part: Part) -> list[Eqn]:
        """Slices of values that the body makes for all examples (inputs simply are smaller)."""
        out = []
        for (v, c), (x, _) in part.seqs.items():
            if sum(v is u for u, _ in part.seqs) > 1 or not isinstance(c, Shard):
                raise _Not
            if v not in a.region.inputs and x not in self.made:
                self.made.add(x)
                size = shape_of(v)[c.dim] // self.k
                out.append(Eqn(aten("slice", "Tensor"), (v, c.dim, 0, size), (x,)))
        return out

    def late(self, e: Eqn, env: dict[Var, Var]) -> Eqn:
        """An equation on sums and on what has no examples; its results' types follow."""
        if all(env.get(v, v).type == v.type for v in e.inputs) or not isinstance(e.op, OpOverload):
            return renamed(e, env)
        try:
            return self.retyper.equation(e, lambda v: env.get(v, v))
        except (RuntimeError, ValueError, TypeError, IndexError):
            raise _Not from None


def _elem(v: Var) -> object:
    t = v.type
    t = t.elem if isinstance(t, SeqType) else t
    return (t.shape, t.dtype) if isinstance(t, TensorType) else None


def _bytes(v: Var) -> int:
    return nbytes(v.type.elem if isinstance(v.type, SeqType) else v.type)
