"""NaN and infinity in a training: a step that makes one is refused, skipped, or only told of.

Inside compiled steps the place is found by :mod:`mlc.compiled.nonfinite`.  What else changes parameters (the heads' own
optimizer steps, levels that are trained as plain PyTorch, roll-back) is looked at once when the step is over.  A step
that is skipped leaves everything that is trained as it was; its data and random numbers count as drawn, so the next
step has others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlc.errors import MlcWarning, NonfiniteError, PlanError
from mlc.runtime.interpreter.watching import finite
from mlc.training.level import Level
from mlc.training.state.snapshot import Snapshots

__all__ = ["Guard"]

_IN_A_ROW = 10


class Guard:
    """What becomes of steps that are not finite.

    Attributes:
        how: ``"raise"``, ``"skip"`` or None.
        skipped: Steps skipped in a row.
    """

    def __init__(self, how: str | None, levels: Sequence[Level], snapshots: Snapshots) -> None:
        if how not in ("raise", "skip", None):
            raise PlanError(f"nonfinite={how!r}", advice='use "raise", "skip" or None')
        self.how = how
        self._levels, self._snapshots = levels, snapshots
        self.skipped = 0

    def step(self, number: int, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A step of the training; its losses by level (NaN where it was skipped).

        Raises:
            NonfiniteError: with the number of the step, where it is not finite and not to be skipped; or where many
                were skipped in a row.
        """
        if self.how is None:
            return do()
        before = self._snapshots.trained() if self.how == "skip" else None
        try:
            values = do()
            self._look(values)
        except NonfiniteError as e:
            self.skipped += 1
            told = _at(e, number)
            if before is None or self.skipped >= _IN_A_ROW:
                raise told from e
            self._snapshots.put_trained(before)
            warnings.warn(MlcWarning(f"step {number} is skipped: {told}"), stacklevel=6)
            return {x.name: float("nan") for x in self._levels}
        self.skipped = 0
        return values

    def _look(self, values: Mapping[str, Any]) -> None:
        """Everything that is trained, once the step is over."""
        if finite([*(p for x in self._levels for p in x.params), *values.values()]) and _numbers_are(values):
            return
        for x in self._levels:
            if not finite([values[x.name]]) or not _numbers_are({x.name: values[x.name]}):
                raise NonfiniteError(f"level {x.name!r}: its loss is not finite", level=x.name, loc=x.loc)
            if not finite([p.grad for p in x.params]):
                raise NonfiniteError(f"level {x.name!r}: its gradient is not finite", level=x.name, loc=x.loc)
            if not finite(x.params):
                raise NonfiniteError(
                    f"level {x.name!r}: its gradient is finite, and its parameters are not after the step of its "
                    f"optimizer ({type(x.optimizer).__name__})",
                    level=x.name, operator=f"{type(x.optimizer).__name__}.step", loc=x.loc,
                    advice="a smaller learning rate, a larger eps, clip=",
                )  # fmt: skip


def _numbers_are(values: Mapping[str, Any]) -> bool:
    return all(v == v and abs(v) != float("inf") for v in values.values() if isinstance(v, float))


def _at(e: NonfiniteError, number: int) -> NonfiniteError:
    return NonfiniteError(
        f"outer step {number}, {e.what}", level=e.level, steps=(number, *e.steps), kind=e.kind, operator=e.operator,
        loc=e.loc, advice=e.advice,
    )  # fmt: skip
