"""A flow cut: the program with the same values, in which a target no longer depends differentiably on a source.

What a target reads (a level's loss, its update, its start; the results) is computed a second time from a stopped
source, as far as it depends on the source without passing another level; whatever else reads the same values goes on
reading the old ones.  It is what ``detach()`` at every place where the target uses the source would do by hand.
Second versions stand beside the first ones: after the same equation, carried by the same loops.  O(equations) for
each set of sources that a target is cut from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from mlc.errors import PlanError
from mlc.ir.core import Eqn, Grad, Loop, Region, Stop, Var, map_vars
from mlc.ir.levels.steps import Step, find_steps
from mlc.ir.levels.valuegraph import ValueGraph
from mlc.ir.origin import Origin
from mlc.ir.program import Program

__all__ = ["severed"]


def severed(program: Program, flows: Collection[tuple[str, str]]) -> Program:
    """The program without these flows.

    Args:
        program: A traced program, as it was traced.
        flows: Each a source (a meta-parameter or level) and a target (a level), by name.

    Raises:
        PlanError: where values belong to several levels, or enter a target by a way that no flow shows.
    """
    return _Severing(program, flows).program() if flows else program


OUTER = Stop(-2)  # gradients that the loop takes pass: its values stay


@dataclass
class _More:
    """What a loop carries, reads and emits besides: pairs of its own value and the one outside."""

    carries: list[tuple[Var, Var, Var, Var]] = field(default_factory=list)  # before, start, next, result
    consts: list[tuple[Var, Var]] = field(default_factory=list)
    seqs: list[tuple[Var, Var]] = field(default_factory=list)
    emits: list[tuple[Var, Var]] = field(default_factory=list)


class _Severing:
    """Second versions of values, each known by the value and the sources (bits) that it is cut from."""

    def __init__(self, source: Program, flows: Collection[tuple[str, str]]) -> None:
        self.source = source
        self.graph = ValueGraph(source.region)
        steps = find_steps(self.graph)
        self.steps: dict[str, list[Step]] = {x.name: [s for s in steps if s.site.at in x.at] for x in source.levels[1:]}
        names = [source.inputs[i].name for i in source.metas] + list(self.steps)
        self.bit = {n: 1 << k for k, n in enumerate(names)}
        self.seeds: dict[Var, int] = {source.region.inputs[i]: self.bit[source.inputs[i].name] for i in source.metas}
        self.own = {n: self._own(found) for n, found in self.steps.items()}
        for n, own in self.own.items():
            for v in own:
                self.seeds[v] = self.seeds.get(v, 0) | self.bit[n]
        self.walls = {v for own in self.own.values() for v in own}
        self.reach = self.graph.spread(self.seeds, walls=self.walls, free=True)
        self.cut: dict[str, int] = defaultdict(int)
        for a, b in flows:
            self.cut[b] |= self.bit[a]
        self.made: dict[tuple[Var, int], Var] = {}
        self.behind: dict[Var, list[Eqn]] = defaultdict(list)
        self.more: dict[Eqn, _More] = defaultdict(_More)
        self.args: dict[Eqn, tuple[object, ...]] = {}
        self.by: dict[Eqn, int] = {}

    def _own(self, steps: list[Step]) -> set[Var]:
        """What a level holds: what it trains, and all of its update."""
        return {x for s in steps for v, after, _, _ in s.trained for x in (v, after)} | {
            v for s in steps for v in s.zone
        }

    # ---- targets

    def program(self) -> Program:
        """The program, cut."""
        self._known_flows()
        for name in self.own:
            if self.cut[name]:
                for e in self._entered(name):
                    self._enter(e, self._places(name, e), self.cut[name])
        n, region = self.source.n_outputs, self.source.region
        outs = [self.version(v, self.cut["L0"]) if i < n else v for i, v in enumerate(region.outputs)]
        at: dict[Eqn, tuple[int, ...]] = {}
        new = self._rebuilt(Region(region.inputs, region.eqns, tuple(outs), region.names), (), at)
        levels = [
            replace(x, at=tuple(at[s.site.eqn] for s in self._in_order(x.name, x.at))) for x in self.source.levels
        ]
        return replace(self.source, region=new, levels=tuple(levels))

    def _in_order(self, name: str, at: tuple[tuple[int, ...], ...]) -> list[Step]:
        found = {s.site.at: s for s in self.steps.get(name, ())}
        return [found[x] for x in at]

    def _entered(self, name: str) -> Iterator[Eqn]:
        """Equations by which something enters a level: its gradients, its update, the loops that start it."""
        own = self.own[name]
        mine = {s.site.eqn for s in self.steps[name]}
        seen = dict.fromkeys(e for v in own if (e := self.graph.producer.get(v)) is not None)
        seen.update(dict.fromkeys(mine))
        seen.update(dict.fromkeys(self.graph.entry[v][0] for v in own if v in self.graph.entry))
        yield from seen

    def _places(self, name: str, e: Eqn) -> list[int]:
        """Positions of the arguments of such an equation that enter the level; its own values do not."""
        own = self.own[name]
        if isinstance(e.op, Loop):
            return [i for i, v in enumerate(e.op.body.inputs) if v in own and e.args[i] not in own]
        mine = {s.site.eqn for s in self.steps[name]}
        if e in mine and isinstance(e.op, Grad):
            n = e.op.n_loss + e.op.n_wrt
            return [*range(e.op.n_loss), *range(n, len(e.args))]
        return list(range(len(e.args)))

    def _enter(self, e: Eqn, places: list[int], bits: int) -> None:
        self._fed_by_loops(e, bits)
        if not any(self._bits(v) & bits for i in places for v in _vars(e.args[i])):
            return
        if self.by.setdefault(e, bits) != bits:
            raise self._shared(e)
        args = list(self.args.get(e, e.args))
        for i in places:
            args[i] = map_vars(e.args[i], lambda v: self.version(v, bits))
        self.args[e] = tuple(args)

    def _fed_by_loops(self, e: Eqn, bits: int) -> None:
        """A value of the level that is the result of a loop of another one cannot be cut from it."""
        if isinstance(e.op, Loop):
            for v in e.outs:
                if v in self.walls and self.reach.get(v, 0) & ~self.seeds[v] & bits:
                    raise self._shared(e)

    def _bits(self, v: Var) -> int:
        """Sources that go out of a value without passing another level."""
        return self.seeds[v] if v in self.walls else self.reach.get(v, 0) if v.type.is_float else 0

    def _known_flows(self) -> None:
        """Every way into a target must be a flow of the program.

        Raises:
            PlanError: for one that is not, naming both ends.
        """
        known = {(f.source, f.target) for f in self.source.flows} | {(n, n) for n in self.bit}
        for name in self.own:
            for e in self._entered(name):
                for v in [v for i in self._places(name, e) for v in _vars(e.args[i])]:
                    self._is_known(known, self._bits(v), name, e)
        for v in self.source.region.outputs[: self.source.n_outputs]:
            self._is_known(known, self._bits(v), "L0", None)

    def _is_known(self, known: set[tuple[str, str]], bits: int, target: str, e: Eqn | None) -> None:
        for n, bit in self.bit.items():
            if bits & bit and (n, target) not in known:
                raise PlanError(
                    f"paths: {n} enters {target} by a way that is no flow of this program (a gradient inside a loss, or"
                    " a value of an update)", loc=None if e is None else e.loc,
                    advice="cut it in the code, with detach()",
                )  # fmt: skip

    def _shared(self, e: Eqn | None) -> PlanError:
        return PlanError(
            "paths: a value belongs to several levels here, so one of them cannot be cut off",
            loc=None if e is None else e.loc, advice="cut it in the code, with detach()",
        )  # fmt: skip

    # ---- second versions

    def version(self, v: Var, bits: int) -> Var:
        """The value, cut from these sources; itself where it does not depend on them."""
        bits &= self._bits(v)
        if not bits:
            return v
        if (v, bits) not in self.made:
            self._make(v, bits)
        return self.made[v, bits]

    def _make(self, v: Var, bits: int) -> None:
        e, entry = self.graph.producer.get(v), self.graph.entry.get(v)
        if v in self.seeds:
            self._stop(v, bits, self.seeds[v])
        elif e is None:
            assert entry is not None
            self._entering(v, *entry, bits)
        elif not isinstance(e.op, Loop):
            self._again(e, bits)
        else:
            self._leaving(v, e, e.op, bits)

    def _stop(self, v: Var, bits: int, whole: int) -> None:
        if whole & ~bits:
            raise self._shared(self.graph.producer.get(v))
        new = self.made[v, bits] = Var(v.type, v.mask)
        e = self.graph.producer.get(v)
        self.behind[v].append(Eqn(OUTER, (v,), (new,), (), e.loc if e is not None else None, Origin.PATH))

    def _again(self, e: Eqn, bits: int) -> None:
        """The equation over second versions of what it reads."""
        args = map_vars(e.args, lambda x: self.version(x, bits))
        kwargs = tuple((k, map_vars(x, lambda y: self.version(y, bits))) for k, x in e.kwargs)
        outs = tuple(Var(o.type, o.mask) for o in e.outs)
        self.made.update(
            {(o, bits & self._bits(o)): new for o, new in zip(e.outs, outs, strict=True) if self._bits(o) & bits}
        )
        self.behind[e.outs[-1]].append(e.with_(args=args, kwargs=kwargs, outs=outs))

    def _entering(self, v: Var, loop: Eqn, i: int, bits: int) -> None:
        op = loop.op
        assert isinstance(op, Loop)
        if i < op.n_carry:
            self._carry(loop, op, i, bits)
            return
        new = self.made[v, bits] = Var(v.type, v.mask)
        into = self.more[loop].consts if i < op.n_carry + op.n_const else self.more[loop].seqs
        into.append((new, self.version(loop.args[i], bits)))

    def _carry(self, loop: Eqn, op: Loop, i: int, bits: int) -> None:
        before, after, out = op.body.inputs[i], op.body.outputs[i], loop.outs[i]
        new, end = Var(before.type, before.mask), Var(out.type, out.mask)
        self.made[before, bits & self._bits(before)] = new
        self.made[out, bits & self._bits(out)] = end
        start = self.version(loop.args[i], bits)
        self.more[loop].carries.append((new, start, self.version(after, bits), end))

    def _leaving(self, v: Var, loop: Eqn, op: Loop, bits: int) -> None:
        i = loop.outs.index(v)
        inner = op.body.outputs[i]
        if i >= op.n_carry:
            new = self.made[v, bits] = Var(v.type, v.mask)
            self.more[loop].emits.append((self.version(inner, bits), new))
        elif inner in self.walls:
            self._stop(v, bits, self.seeds[inner])
        else:
            self._carry(loop, op, i, bits)

    # ---- the new region

    def _rebuilt(self, region: Region, path: tuple[int, ...], at: dict[Eqn, tuple[int, ...]]) -> Region:
        """The region with second versions in it; ``at``: where equations of the old one are now."""
        eqns = [x for v in region.inputs for x in self.behind.get(v, ())]
        for e in region.eqns:
            at[e] = (*path, len(eqns))
            new = e.with_(args=self.args[e]) if e in self.args else e
            if isinstance(e.op, Loop):
                new = self._loop(e, new, e.op, at)
            eqns.append(new)
            eqns += [x for v in e.outs for x in self.behind.get(v, ())]
        return Region(region.inputs, tuple(eqns), region.outputs, region.names)

    def _loop(self, old: Eqn, e: Eqn, op: Loop, at: dict[Eqn, tuple[int, ...]]) -> Eqn:
        m = self.more.get(old, _More())
        body = self._rebuilt(op.body, at[old], at)
        n, k = op.n_carry, op.n_carry + op.n_const

        def with_more(xs: tuple[Var, ...], carries: list[Var], consts: list[Var], seqs: list[Var]) -> tuple[Var, ...]:
            return (*xs[:n], *carries, *xs[n:k], *consts, *xs[k:], *seqs)

        new = ([x[0] for x in m.carries], [x[0] for x in m.consts], [x[0] for x in m.seqs])
        given = ([x[1] for x in m.carries], [x[1] for x in m.consts], [x[1] for x in m.seqs])
        outputs = (*body.outputs[:n], *[x[2] for x in m.carries], *body.outputs[n:], *[x[0] for x in m.emits])
        outs = (*e.outs[:n], *[x[3] for x in m.carries], *e.outs[n:], *[x[1] for x in m.emits])
        names = body.names and (
            *body.names[:n], *[""] * len(m.carries), *body.names[n:k], *[""] * len(m.consts), *body.names[k:],
            *[""] * len(m.seqs),
        )  # fmt: skip
        body = Region(with_more(body.inputs, *new), body.eqns, outputs, names or ())
        larger = replace(op, body=body, n_carry=n + len(m.carries), n_const=op.n_const + len(m.consts))
        return e.with_(op=larger, args=with_more(e.args, *given), outs=outs)


def _vars(a: object) -> list[Var]:
    found: list[Var] = []
    map_vars(a, found.append)
    return found
