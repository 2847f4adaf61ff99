"""What happens in a training, for callbacks; and early stopping, which is one.

A callback is anything that can be called with an :class:`Event`.  One with ``state_dict()`` and ``load_state_dict()``
is part of the training's state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mlc.errors import TrainingError
from mlc.training.interface import Trained

__all__ = ["EarlyStopping", "Event", "numbers"]


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: ``"start"`` (of a run), ``"step"`` (an outer step is done), ``"valid"`` (validation gave values),
            ``"checkpoint"`` (one is on the disk: that after ``step``) or ``"end"`` (of a run).
        training: The training; ``training.stop("why")`` ends the run after this step.
        step: Outer steps done so far.
        path: Of the checkpoint.
    """

    kind: str
    training: Trained = field(repr=False)
    step: int
    path: str | None = None
    _values: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def values(self) -> dict[str, float]:
        """Losses of the step by level; of ``"valid"``, what the validation returned."""
        return numbers(self._values)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Python numbers of scalar tensors and numbers."""
    return {k: float(v.item() if isinstance(v, Tensor) else v) for k, v in values.items()}


class EarlyStopping:
    """Ends the run when a value has not improved for some time.

    Attributes:
        best: The best value so far.
        waited: How many values since then.
    """

    def __init__(self, patience: int = 5, value: str = "valid", *, least: float = 0.0, higher: bool = False) -> None:
        """Say what must improve.

        Args:
            patience: Values without improvement after which the run ends, from 1 on.
            value: Name of a validated value (``"valid"``, or ``"valid.accuracy"`` where the validation returns a
                dict), or of a level: its loss.
            least: By how much better a value must be than the best one.
            higher: Whether more is better.

        Raises:
            TrainingError: for a patience below 1.
        """
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise TrainingError(f"patience={patience!r}", advice="a whole number from 1 on")
        self.patience, self.value, self.least, self.higher = patience, value, least, higher
        self.best = -math.inf if higher else math.inf
        self.waited = 0

    def __call__(self, event: Event) -> None:
        """Look at the values of a step or a validation.

        Raises:
            TrainingError: when a run begins in which the value does not occur.
        """
        if event.kind == "start":
            self._check(event)
        if event.kind not in ("step", "valid") or self.value not in event.values:
            return
        now = event.values[self.value]
        better = now > self.best + self.least if self.higher else now < self.best - self.least
        if better:
            self.best, self.waited = now, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            event.training.stop(f"{self.value} has not improved on {self.best:.6g} for {self.waited} values")

    def _check(self, event: Event) -> None:
        names = [x.name for x in event.training.levels]
        known = self.value in names or self.value.split(".")[0] == "valid"
        if not known or (self.value not in names and not event.training.validates):
            raise TrainingError(
                f"EarlyStopping waits for {self.value!r}, which this run does not produce",
                advice=f'run(..., valid=..., valid_every=...) for "valid", or a level: {", ".join(names)}',
            )

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what another one did."""
        self.best, self.waited = state["best"], state["waited"]
