"""The training that levels make: :class:`Training`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mlc.compiled.compiled import CompiledFunction
from mlc.errors import TrainingError
from mlc.ir.program import Program
from mlc.training.compiled import Compiled, names_of
from mlc.training.events import Event
from mlc.training.level import Level, shape_of
from mlc.training.loggers import loggers
from mlc.training.nonfinite import Guard
from mlc.training.options import options_of, place_of
from mlc.training.order.blocks import arrange, flat
from mlc.training.order.reading import read
from mlc.training.running import Run
from mlc.training.state.optimizer import copied
from mlc.training.state.snapshot import Snapshots
from mlc.training.state.start import Start
from mlc.training.stepping import Stepper, Turn
from mlc.view.plan import Plan

__all__ = ["Training"]


class Training:
    """Levels, from bottom to top, and the steps that they make together.

    One step (an *outer step*): every level below the top takes its ``steps``, those that stand below another one once
    for each step of that one; the top's loss is evaluated and differentiated through all of it, and the top steps.
    ``print(training)`` shows the order that was found, ``print(training.source)`` the loop that it stands for.

    Attributes:
        levels: The levels, bottom to top.
        step: Outer steps done so far.
        until: The outer step at which the run so far was to end.
        stopped: Why the last run ended before its time, or None.
        validates: Whether the present run validates.
        place: Which process this is, and which ones train together.
        guard: What becomes of steps that are not finite.
    """

    def __init__(self, levels: Any, *, memory: int | str | None = None, precision: Any = None, mesh: Any = None,
                 callbacks: Sequence[Callable[[Event], None]] = (), logger: Any = None,
                 nonfinite: str | None = "raise") -> None:  # fmt: skip
        """Find out how the levels hang together; every loss is run once, on a first batch, and put back.

        Args:
            levels: From bottom to top: the last one is the top. Levels that stand side by side are given as
                ``mlc.Simultaneous(a, b)`` or ``mlc.Alternating(a, b)``.
            memory: Budget of a step, as for ``mlc.compile``.
            precision: As for ``mlc.compile``; of levels that say nothing themselves.
            mesh: As for ``mlc.compile``.
            callbacks: Functions of an :class:`~mlc.training.events.Event`.
            logger: Something with ``log(step, values)``, or several.
            nonfinite: What becomes of a step with NaN or infinity in any level: ``"raise"``, an error that names the
                level, the step and the operator where it began; ``"skip"``, a warning that does, and everything trained
                as before the step (it keeps a copy of that); None, what PyTorch does.

        Raises:
            TrainingError: when the levels do not fit together; it names them.
            CaptureError: when a loss cannot be represented, with its line.
            PlanError: for options that make no sense.
        """
        _check_mode()
        self.levels = flat(levels)
        self._check_apart()
        self.callbacks: list[Callable[[Any], None]] = [callbacks] if callable(callbacks) else list(callbacks)
        for f in self.callbacks:
            if not callable(f) or isinstance(f, type):
                raise TrainingError(
                    f"callbacks contain {f!r}", advice="functions of an event, or objects with __call__"
                )
        self.loggers = loggers(logger)
        options = options_of(self.levels, memory, precision, mesh, nonfinite)
        readings = {x: read(x, self.levels) for x in self.levels}
        self.blocks = arrange(levels, list(readings.values()))
        starts = {x: Start(x) for x in self.levels if x.cold}
        self.place = place_of(readings.values(), mesh)
        self._steppers = [
            Stepper(b, readings, starts, options if b.body or b is self.blocks[-1] else None) for b in self.blocks
        ]
        self._written = {x: list(r.written.values()) for x, r in readings.items()}
        self.snapshots = Snapshots(self.levels, readings, starts)
        self.guard = Guard(nonfinite, self.levels, self.snapshots)
        self.step = 0
        self.validates = False
        self.until = 0
        self.stopped: str | None = None
        self.warned = False

    def __str__(self) -> str:
        return "\n".join(line for b in self.blocks for line in b.lines())

    # ---- what it stands for

    @property
    def source(self) -> str:
        """The loops that the levels stand for, as Python."""
        return "\n".join(turn.loop.source for s in self._steppers for turn in s.turns)

    @property
    def function(self) -> CompiledFunction:
        """The compiled step of the top level, for ``mlc.check`` and its kin: see :meth:`arguments`."""
        found = self._top.compiled
        assert found is not None
        return found

    def arguments(self) -> tuple[Any, ...]:
        """Arguments of :attr:`function`: first batches; no data is drawn."""
        return self._top.arguments()

    @property
    def program(self) -> Program:
        """The program of the last step; before the first one, that of a step that is traced and put back."""
        return self.function.program or self._top.traced()

    @property
    def plan(self) -> Plan:
        """The plan of the last step; before the first one, that of a step that is traced and put back."""
        return self.function.plan or self._top.planned()

    @property
    def recordings(self) -> int:
        """How often a step ran as Python, to be recorded."""
        return sum(t.compiled.recordings for s in self._steppers for t in s.turns if t.compiled is not None)

    @property
    def _compiled(self) -> list[Compiled | None]:
        return [t.compiled for s in self._steppers for t in s.turns]

    @property
    def _top(self) -> Turn:
        return self._steppers[-1].turns[-1]

    # ---- running

    def run(self, steps: int, checkpoint: str | os.PathLike[str] | None = None, every: int | None = None,
            valid: Callable[[], Any] | None = None, valid_every: int | None = None) -> dict[str, float]:  # fmt: skip
        """Make outer steps.

        With ``checkpoint``, a run that was killed goes on where its newest checkpoint is when the same program is
        started again: the first ``run`` with that folder loads it, and makes the steps that are left.

        Args:
            steps: How many.
            checkpoint: A folder for checkpoints, which are written while the training goes on; the newest three are
                kept. SIGTERM then saves after the step under way, and ends the process (exit code 143).
            every: Steps from checkpoint to checkpoint; None: a tenth of the run. There is one at the end in any case.
            valid: Called without arguments, without gradients; returns a number, a scalar tensor or a dict of them.
                Random generators and the modes of modules are put back after it.
            valid_every: Steps from validation to validation; None: at the end only.

        Returns:
            Values of the last step: the loss of each level by name, validated values as ``"valid"`` or
            ``"valid.name"``.

        Raises:
            TrainingError: for arguments that make no sense, data that is empty, a checkpoint of another program, a
                folder that cannot be written to, or a disk that is full.
        """
        _check_mode()
        return Run(self, steps, checkpoint, every, valid, valid_every).go()

    def stop(self, why: str = "stopped") -> None:
        """End the run after this step (for callbacks)."""
        self.stopped = why

    def advance(self) -> dict[str, Any]:
        """One outer step; losses by level."""
        values = self.guard.step(self.step + 1, self._advance)
        self.step += 1
        return {x.name: values[x.name] for x in self.levels}

    def _advance(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for s in self._steppers:
            values |= s.step()
        return values

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, in tensors, numbers and text: ``torch.save`` it.

        A training over the same levels that loads it goes on bit for bit, in the middle of an epoch too.
        """
        kept = [copied(f.state_dict()) if hasattr(f, "state_dict") else None for f in self.callbacks]
        plans = [{} if t.compiled is None else t.compiled.plans() for s in self._steppers for t in s.turns]
        own = {"step": self.step, "end": self.until, "stopped": self.stopped, "callbacks": kept, "plans": plans}
        names = {id(t): n for n, t in names_of(self.levels, self._written).items()}
        own["particles"] = [c and c.particles.state_dict(names) for c in self._compiled]
        return {**self.snapshots.take(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a state; a run after that makes its steps from there.

        Raises:
            TrainingError: for a state of other levels.
        """
        self.resume(state)
        self.until, self.stopped = self.step, None

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go to a state in the middle of its run."""
        self.snapshots.check(state)
        turns = [t for s in self._steppers for t in s.turns]
        if len(state["plans"]) != len(turns):
            raise TrainingError(
                f"the state holds plans of {len(state['plans'])} steps, this training has {len(turns)}",
                advice="the levels that it was saved from",
            )
        with_state = [f for f in self.callbacks if hasattr(f, "load_state_dict")]
        kept = [s for s in state.get("callbacks", ()) if s is not None]
        if len(with_state) != len(kept):
            raise TrainingError(
                f"the state holds {len(kept)} callbacks' states, and {len(with_state)} callbacks here have one",
                advice="the callbacks that it was saved with",
            )
        self.snapshots.put(state)
        for f, s in zip(with_state, kept, strict=True):
            f.load_state_dict(s)
        for turn, plans in zip(turns, state["plans"], strict=True):
            if turn.compiled is not None:
                turn.compiled.take_over(plans)
        tensors = names_of(self.levels, self._written)
        for compiled, particles in zip(self._compiled, state.get("particles", ()), strict=False):
            if compiled is not None and particles is not None:
                compiled.particles.load_state_dict(particles, tensors)
        self.step, self.until, self.stopped = state["step"], state["end"], state["stopped"]

    # ---- checks

    def _check_apart(self) -> None:
        """No tensor is trained twice."""
        owner: dict[int, Level] = {}
        for x in self.levels:
            for p in x.params:
                other = owner.setdefault(id(p), x)
                if other is not x:
                    raise x.refuse(f"{shape_of(p)} is trained by level {other.name!r} as well", "train it in one level")


def _check_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise TrainingError("a training under torch.inference_mode()", advice="outside of it")
