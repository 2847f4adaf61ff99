"""One run of a training: steps, validation, checkpoints, logs, progress, the end."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mlc.errors import MlcWarning, TrainingError
from mlc.progress import progress
from mlc.trace.generators import kept
from mlc.training.events import Event, numbers
from mlc.training.folders import given
from mlc.training.interface import Trained
from mlc.training.interruption import Interruption, watched
from mlc.training.state.checkpoints import Checkpoints
from mlc.training.state.saver import Saver

__all__ = ["Run"]

_OFTEN = 8  # recordings from which on a run in which most steps are recorded says so


class Run:
    """What ``Training.run`` does."""

    def __init__(
        self, training: Trained, steps: Any, checkpoint: Any, every: Any, valid: Any, valid_every: Any
    ) -> None:
        _count("steps", steps, 0)
        checkpoint, every = given(training, checkpoint, every)
        if every is not None:
            _count("every", every, 1)
            if checkpoint is None:
                raise TrainingError("every= without checkpoint=", advice='run(..., checkpoint="folder", every=100)')
        if valid is not None and not callable(valid):
            raise TrainingError(f"valid is a {type(valid).__name__}", advice="a function without arguments")
        if valid_every is not None:
            _count("valid_every", valid_every, 1)
            if valid is None:
                raise TrainingError("valid_every= without valid=", advice="run(..., valid=function, valid_every=100)")
        self.training = training
        self.every = every or max(1, steps // 10)
        self.valid, self.valid_every = valid, valid_every
        self.start, self.end = training.until, training.until + steps
        self.saver = None if checkpoint is None else Saver(Checkpoints(checkpoint, training.place))
        self.values: dict[str, Any] = {}
        self.shown = sys.stderr.isatty()
        self.told = False
        self.saved: tuple[int, bool] | None = None

    def go(self) -> dict[str, float]:
        """The steps that are left; the last values."""
        t = self.training
        if self.saver is not None:
            t.snapshots.tell()
            self._continue()
        t.validates = self.valid is not None
        if t.stopped is not None and t.step > self.start:
            t.until = t.step  # it was continued after it had ended early
            return {}
        t.stopped = None
        self._tell("start", {})
        before = t.recordings
        try:
            with progress("training") as say, torch.enable_grad(), watched(self.saver is not None) as signals:
                self._steps(say, before, signals)
        except BaseException as e:
            t.until = t.step
            if self.saver is not None:
                self.saver.end(e)
            raise
        t.until = t.step if t.stopped is not None else self.end
        self._save(final=True)
        self._tell_of_saves(all_of_them=True)
        self._tell("end", self.values)
        return numbers(self.values)

    def _steps(self, say: Callable[[str], None], before: int, signals: Interruption) -> None:
        t, clock = self.training, time.perf_counter()
        talk = t.place.talk if self.saver is not None else None
        for k in range(self.end - t.step):
            self._step()
            self._say(say, (k + 1) / (time.perf_counter() - clock))
            self._warn(before)
            if t.stopped is not None:
                return
            self._tell_of_saves()
            if (signals.asked if talk is None else talk.any(signals.asked)) and t.step < self.end:
                self._save()
                self._tell_of_saves(all_of_them=True)
                signals.answer()

    def _step(self) -> None:
        t = self.training
        self.values = dict(t.advance())
        self._tell("step", self.values)
        last = t.step == self.end or t.stopped is not None
        due = t.step % self.valid_every == 0 if self.valid_every else last
        if self.valid is not None and (due or last):
            found = _validated(self.valid, t)
            self.values |= found
            self._tell("valid", found)
        if t.loggers:
            held = numbers(self.values)
            for x in t.loggers:
                x.log(t.step, held)
        if t.step % self.every == 0 and not last:
            self._save()

    def _save(self, final: bool = False) -> None:
        t = self.training
        self._warn_of_values()
        if self.saver is None or self.saved == (t.step, final):
            return
        state = t.state_dict()
        if not final:
            state["end"] = self.start
        self.saver.save(t.step, state)
        self.saved = (t.step, final)

    def _tell_of_saves(self, all_of_them: bool = False) -> None:
        """What was written in the meantime."""
        if self.saver is None:
            return
        if all_of_them:
            self.saver.wait()
        for step, path in self.saver.finished():
            self._tell("checkpoint", {}, os.fspath(path), step)

    def _continue(self) -> None:
        """Go on from the newest checkpoint of the folder, where it is ahead."""
        assert self.saver is not None
        found = self.saver.checkpoints.newest()
        if found is None or found[1]["step"] <= self.training.step:
            return
        path, state = found
        self.training.snapshots.check_program(state, f"the checkpoint {path}")
        self.training.resume(state)
        print(f"mlc: goes on from {path}, after step {self.training.step}", file=sys.stderr)

    def _tell(self, kind: str, values: Mapping[str, Any], path: str | None = None, step: int | None = None) -> None:
        event = Event(kind, self.training, self.training.step if step is None else step, path, dict(values))
        for f in self.training.callbacks:
            f(event)

    def _say(self, say: Callable[[str], None], speed: float) -> None:
        if not self.shown:
            return
        losses = ", ".join(f"{k} {v:.4g}" for k, v in numbers(self.values).items())
        say(f"step {self.training.step} of {self.end}, {losses}, {speed:.3g} steps/s")

    def _warn_of_values(self) -> None:
        skipped = {x.name for x in self.training.levels} if self.training.guard.skipped else set()  # told already
        wrong = [(k, v) for k, v in numbers(self.values).items() if not math.isfinite(v) and k not in skipped]
        if wrong and not self.told:
            self.told = True
            name, value = wrong[0]
            said = f"after step {self.training.step} {name!r} is {value}"
            warnings.warn(MlcWarning(f"{said}: clip, smaller steps, or fewer of them help"), stacklevel=5)

    def _warn(self, before: int) -> None:
        """Steps that are recorded anew again and again cost a multiple."""
        t = self.training
        made = t.recordings - before
        if made >= _OFTEN and 2 * made > t.step - self.start and not t.warned:
            t.warned = True
            said = (
                f"{made} of {t.step - self.start} steps were recorded anew: something that Python reads differs from "
                "step to step (numbers or text in batches, shapes, counters in a loss); keep it in tensors"
            )
            warnings.warn(MlcWarning(said), stacklevel=5)


def _count(what: str, n: Any, least: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < least:
        raise TrainingError(f"{what}={n!r}", advice=f"a whole number from {least} on")


def _validated(valid: Callable[[], Any], t: Trained) -> dict[str, Any]:
    """Values of a validation."""
    with torch.no_grad(), kept(t.snapshots.generators), _modes(t):
        found = valid()
    named = {f"valid.{k}": v for k, v in found.items()} if isinstance(found, Mapping) else {"valid": found}
    for k, v in named.items():
        if isinstance(v, bool) or not (isinstance(v, (int, float)) or (isinstance(v, Tensor) and v.numel() == 1)):
            raise TrainingError(
                f"the validation returned a {type(v).__name__} as {k!r}", advice="a number, or a dict of numbers"
            )
    return named


@contextlib.contextmanager
def _modes(t: Trained) -> Iterator[None]:
    """``train()`` and ``eval()`` of modules are put back."""
    before = [(m, m.training) for m in t.snapshots.modules]
    try:
        yield
    finally:
        for m, mode in before:
            m.training = mode
