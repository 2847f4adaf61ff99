"""A recorded call that can be run again: the plain unroll, from what the call started from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlc.compiled.compiled import CompiledFunction
from mlc.ir.core import Draw, Eqn, Random, Stop, Var
from mlc.ir.types import Loc
from mlc.trace.capture import Recording
from mlc.trace.gradients.unroll import Unroll
from mlc.trace.observe import Observation
from mlc.trace.recorder.randomness import RandomWatch

__all__ = ["Began", "Frozen", "Recorded", "Start", "Watched"]


@dataclass(frozen=True)
class Start:
    """What a recorded call started from: copies, so that it can be run whatever became of the user's objects.

    Attributes:
        inputs: First values of the tensors from outside.
        needs: Which of them required a gradient.
        items: Tensors of every item that iterables gave, by source and visit.
        moved: States of the default generator where an iterable moved it, by source, visit and item.
        random: States of all generators at the start.
        declared: Whether the user declared a way that PyTorch's own graph does not have (``mlc.level``, ``mlc.clone``).
    """

    inputs: list[Tensor]
    needs: list[bool]
    items: dict[tuple[int, int], list[list[Tensor]]]
    moved: dict[tuple[int, int, int], Tensor]
    random: list[Any]
    declared: bool

    @staticmethod
    def of(seen: Observation) -> Start:
        """Copied while the observation still keeps it."""
        before = seen.observer.snapshots.before
        drawn = seen.observer.drawn_items.items()
        return Start(
            [seen.initial(x).detach().clone() for x in seen.recording.externals],
            [x.tensor.requires_grad for x in seen.recording.externals],
            {key: [[before(t).detach().clone() for t in item] for item in items] for key, items in drawn},
            dict(seen.observer.item_states),
            list(seen.random[0]),
            seen.observer.farther,
        )


class Watched(CompiledFunction):
    """A compiled function that keeps what its last recording started from."""

    start: Start | None = None

    def _compile(self, seen: Observation, say: Callable[[str], None]) -> Any:
        self.start = Start.of(seen)
        return super()._compile(seen, say)


@dataclass
class Frozen:
    """Values of one run that another one uses again: of stops, and of draws whose distribution depends on tensors."""

    stops: dict[Eqn, Tensor]
    draws: dict[Eqn, list[Tensor]]


class Recorded(Unroll):
    """The unroll of a recording (see :class:`~mlc.trace.gradients.unroll.Unroll`); one run each.

    Attributes:
        drawn: After a run, the results of draws whose distribution depends on tensors.
    """

    def __init__(self, rec: Recording, start: Start, stop: str = "all", frozen: Frozen | None = None) -> None:
        super().__init__(rec.eqns, [x.var for x in rec.externals], stop, None if frozen is None else frozen.stops)
        self.rec, self.start = rec, start
        self.drawn: dict[Eqn, list[Tensor]] = {}
        self._again = {} if frozen is None else frozen.draws
        self._taken: dict[tuple[int, int], int] = {}

    def results(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the function returned, from these first values of the tensors from outside."""
        RandomWatch.put(self.start.random)
        return self.run(inputs, self.rec.results)

    def kept(self) -> Frozen:
        """What this run's stops and draws gave."""
        return Frozen(dict(self.stopped), dict(self.drawn))

    def owns(self, e: Eqn) -> bool:
        """Whether a stop holds only for the inner gradient that it stands in the way of."""
        return e in self._owner

    def draw(self, op: Draw) -> list[Tensor]:
        """The item that the call drew here; the generator moves as it then did."""
        key = (op.source, op.visit)
        k = self._taken[key] = self._taken.get(key, -1) + 1
        for at in (-1, 0) if k == 0 else (k,):
            state = self.start.moved.get((*key, at))
            if state is not None:
                torch.set_rng_state(state)
        return [t.clone() for t in self.start.items[key][k]]

    def _eqn(self, e: Eqn, env: dict[Var, Any]) -> list[Tensor]:
        out = super()._eqn(e, env)
        if isinstance(e.op, Random) and e.inputs:  # drawn as it is now, so that the generator moves
            out = [t.clone() for t in self._again.get(e, out)]
            self.drawn[e] = out
        return out


class Began(Recorded):
    """Finds where a run, or the gradient of its result, first is not finite.

    Attributes:
        value: Line that made the first value that is no number (or infinite, where none is), None if all are finite.
        gradient: The same for what the outermost gradient passes back.
    """

    def __init__(self, rec: Recording, start: Start, stop: str = "all") -> None:
        super().__init__(rec, start, stop)
        self.value: Loc | None = None
        self.gradient: Loc | None = None
        self._lines = {v: e.loc for e in rec.eqns for v in e.outs}
        self._infinite: Loc | None = None

    def results(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """As :meth:`Recorded.results`."""
        out = super().results(inputs)
        self.value = self.value or self._infinite
        return out

    def _eqn(self, e: Eqn, env: dict[Var, Any]) -> list[Tensor]:
        out = super()._eqn(e, env)
        if self.value is None and not isinstance(e.op, Stop):
            for t in out:
                if t.isnan().any() and "empty" not in str(e.op):
                    self.value = e.loc
                elif self._infinite is None and t.isinf().any() and not all(_infinite(env[v]) for v in e.inputs):
                    self._infinite = e.loc
        return out

    def _define(self, v: Var, t: Tensor, args: Sequence[Any]) -> Tensor:
        t = super()._define(v, t, args)
        if t.requires_grad:
            t.register_hook(partial(self._passed, v))
        return t

    def _passed(self, v: Var, g: Tensor) -> None:
        if self.taking is None and self.gradient is None and not g.isfinite().all():
            self.gradient = self._lines.get(v)


def _infinite(x: object) -> bool:
    return isinstance(x, Tensor) and bool(x.isinf().any())
