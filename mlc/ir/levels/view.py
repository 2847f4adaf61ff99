"""One level as graphs of its own: ``loss(theta, eta, c, batch)``, ``update(grads, theta, state, hyper)``.

Both are cut out of the program when asked for, and are pure functions: what stops a derivative in the loss
is an input of it, so that it is a true scalar function of all its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from torch import fx

from mlc.errors import VerifyError
from mlc.ir.core import Eqn, Grad, Loop, Region, Stop, Var
from mlc.ir.levels.steps import Step, find_steps
from mlc.ir.levels.valuegraph import ValueGraph
from mlc.ir.lowered.fx import region_to_fx
from mlc.ir.origin import Origin
from mlc.ir.problem import Level, Problem

__all__ = ["LevelView"]


class LevelView:
    """A level of a program; ``level`` holds the facts, ``loss`` and ``update`` its graphs.

    Where a level has several gradients, those of a step in a loop are shown rather than those in straight
    code.
    """

    def __init__(self, program: Problem, level: Level) -> None:
        self.program = program
        self.level = level

    def __repr__(self) -> str:
        return f"<{self.level.name} of {self.program.name}: trains {', '.join(self.level.trains)}>"

    @cached_property
    def loss(self) -> fx.GraphModule:
        """The loss of what is trained (``theta0``, ...), stopped values (``stopped0``), and the rest."""
        return region_to_fx(self.loss_region, f"{self.level.name}_loss")

    @cached_property
    def update(self) -> fx.GraphModule:
        """The update from gradients (``grad0``, ...), what is trained, state and what else it reads.

        Results are the next values of what is trained, then of the state.
        """
        return region_to_fx(self.update_region, f"{self.level.name}_update")

    @cached_property
    def loss_region(self) -> Region:
        """The loss as a region."""
        if not self.level.at:
            r = self.program.region
            return _cut_out(r, r.outputs[: self.program.n_outputs], {}, lambda e: False)
        site = self._step.site
        trained = dict.fromkeys(v for v, _, _, _ in self._step.trained)
        names = {v: f"theta{i}" for i, v in enumerate(trained)}
        return _cut_out(site.region, site.losses, names, lambda e: isinstance(e.op, Stop))

    @cached_property
    def update_region(self) -> Region:
        """The update as a region."""
        if not self.level.at:
            raise VerifyError(f"{self.level.name} has no update in the program: what it trains is trained outside")
        graph, step = self._graph, self._step
        after = [a for _, a, _, _ in step.trained]
        region = graph.home[after[0]]
        grads = [v for e in region.eqns if _takes(e, {s.site.eqn for s in self._steps}) for v in e.outs]
        bits = graph.spread({v: 1 for v in grads}, without=("back", "grad"))
        loop = step.trained[0][2]
        if loop is not None and isinstance(loop.op, Loop):
            after += [v for v in self._state(loop.op) if v not in after and (bits.get(v) or self._counts(v))]
        names = {v: f"grad{i}" for i, v in enumerate(v for v in grads if bits.get(v))}
        trained = dict.fromkeys(v for v, _, _, _ in step.trained if graph.home[v] is region)
        names.update({v: f"theta{i}" for i, v in enumerate(trained)})
        return _cut_out(region, after, names, lambda e: False)

    def _state(self, op: Loop) -> list[Var]:
        """Next values of what a loop carries and reads."""
        pairs = zip(op.body.inputs, op.body.outputs[: op.n_carry], strict=False)
        return [after for before, after in pairs if after is not before and self._graph.users[before]]

    def _counts(self, v: Var) -> bool:
        """Whether a value that depends on no gradient belongs to the update all the same (a step count)."""
        e = self._graph.producer.get(v)
        made = [self._graph.producer.get(x) for x in self._step.zone]
        return e is not None and e.origin is Origin.UPDATE and e.loc in [x.loc for x in made if x is not None]

    @cached_property
    def _graph(self) -> ValueGraph:
        return ValueGraph(self.program.region)

    @cached_property
    def _steps(self) -> list[Step]:
        return [s for s in find_steps(self._graph) if s.site.at in self.level.at]

    @property
    def _step(self) -> Step:
        looped = [s for s in self._steps if s.trained[0][2] is not None]
        return (looped or self._steps)[0]


def _takes(e: Eqn, grads: set[Eqn]) -> bool:
    """Whether an equation is one of these gradients, or a loop with one in it."""
    if isinstance(e.op, Grad):
        return e in grads
    return isinstance(e.op, Loop) and any(x in grads for x in e.op.body.walk())


def _cut_out(region: Region, outputs: Iterable[Var], names: dict[Var, str], fence: Callable[[Eqn], bool]) -> Region:
    """What ``outputs`` are made from, back to ``names``, fencing equations and region inputs."""
    outs = tuple(dict.fromkeys(outputs))
    ends = dict(names)
    for e in region.eqns:
        if fence(e) and e.outs[0] not in ends:
            ends[e.outs[0]] = f"stopped{sum(n.startswith('stopped') for n in ends.values())}"
    needed, kept = {v for v in outs if v not in ends}, list[Eqn]()
    for e in reversed(region.eqns):
        if any(v in needed for v in e.outs):
            kept.append(e)
            needed.update(v for v in e.inputs if v not in ends)
    kept.reverse()
    read = {v for e in kept for v in e.inputs} | set(outs)
    labels = dict(zip(region.inputs, region.names or ("",) * len(region.inputs), strict=True))
    inputs = [v for v in ends if v in read] + [v for v in region.inputs if v in read and v not in ends]
    labelled = tuple(ends.get(v) or labels.get(v, "") for v in inputs)
    made = {v for e in kept for v in e.outs}
    return Region(tuple(v for v in inputs if v not in made), tuple(kept), outs, labelled)
