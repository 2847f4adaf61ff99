"""The state of a training: all that its next step depends on, as numbers, text and tensors.

Parameters, optimizers, schedulers, data positions; where cold levels began; what losses write to (running statistics,
averages); random generators, global ones and those that losses and data own; the plans in use, since another plan
rounds otherwise; callbacks that have a state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.errors import MlcWarning, TrainingError
from mlc.trace.generators import Generator
from mlc.training.data import randomness
from mlc.training.level import Level
from mlc.training.order.identity import differing, identity
from mlc.training.order.reading import Reading
from mlc.training.state.optimizer import OptimizerState, copied
from mlc.training.state.start import Start

__all__ = ["Snapshots"]

_FORMAT = 3


class Snapshots:
    """Takes the state of levels, and puts it back.

    Attributes:
        written: Tensors that losses write to, by their place in the user's code.
        generators: Random generators that losses and data own.
        identity: What each level is, as text, to tell another program's states.
        modules: Modules that losses read.
        untold: What losses change that no state contains, by level.
    """

    def __init__(
        self, levels: Sequence[Level], readings: Mapping[Level, Reading], starts: Mapping[Level, Start]
    ) -> None:
        self.levels, self.starts = levels, starts
        self._trained = {id(p) for x in levels for p in x.params}
        self.written: dict[str, Tensor] = {}
        seen: set[int] = set(self._trained)
        for r in readings.values():
            for place, t in r.written.items():
                if id(t) not in seen:
                    seen.add(id(t))
                    self.written[f"{r.level.name}: {place}"] = t
        own = [g for r in readings.values() for g in r.generators] + [g for x in levels for g in x.feed.generators]
        self.generators: list[Generator] = list({id(g): g for g in own}.values())
        self.identity = {x.name: identity(x, readings[x].computes) for x in levels}
        self.modules = list({id(m): m for r in readings.values() for m in r.modules}.values())
        self.untold = {x.name: readings[x].untold for x in levels if readings[x].untold}

    def tell(self) -> None:
        """Warn of what a state does not contain."""
        for name, places in self.untold.items():
            said = ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
            warnings.warn(
                MlcWarning(
                    f"the loss of level {name!r} changes what no checkpoint contains: {said}. Keep it in a tensor, or "
                    "in a callback with state_dict() and load_state_dict()"
                ),
                stacklevel=4,
            )
        self.untold = {}

    def take(self) -> dict[str, Any]:
        """The state now; its tensors are copies."""
        return {
            "format": _FORMAT,
            "levels": {x.name: _level(x) for x in self.levels},
            "starts": {x.name: start.plain() for x, start in self.starts.items()},
            "written": {k: t.detach().clone() for k, t in self.written.items()},
            "random": randomness.plain(randomness.states(self.generators)),
            "kinds": [randomness.kind_of(g) for g in self.generators],
            "program": self.identity,
        }

    def trained(self) -> dict[str, Any]:
        """What steps change, in copies: parameters, optimizers, schedulers, and what losses write to."""
        levels = {x.name: _trained(x) for x in self.levels}
        return {"levels": levels, "written": {k: t.detach().clone() for k, t in self.written.items()}}

    def put_trained(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`trained` or :meth:`take` gave; data and random generators stay where they are."""
        for x in self.levels:
            saved = state["levels"][x.name]
            _copy(x.params, saved["params"])
            OptimizerState.from_plain(saved["optimizer"]).put(x.optimizer, self._trained)
            if x.scheduler is not None:
                x.scheduler.load_state_dict(saved["scheduler"])
        _copy(list(self.written.values()), [state["written"][k] for k in self.written])

    def put(self, state: Mapping[str, Any]) -> None:
        """Go to a state; nothing is changed where levels or shapes do not fit (data is only tried on the way).

        Raises:
            TrainingError: for a state of other levels, or data that cannot be continued.
        """
        self.check(state)
        self.put_trained(state)
        for x in self.levels:
            x.feed.load_state_dict(state["levels"][x.name]["data"])
        for x, start in self.starts.items():
            start.take_over(state["starts"][x.name])
        randomness.restore(state["random"], self.generators)

    def check_program(self, state: Mapping[str, Any], of: str) -> None:
        """Refuse a state of a program that is another one, though its levels have the same names and shapes.

        Raises:
            TrainingError: naming the level, and what it was.
        """
        self.check(state)
        found = differing(state["program"], self.identity)
        if found is not None:
            raise TrainingError(
                f"{of} is of another program: {found}",
                advice="another folder; or training.load_state_dict(mlc.training.load_checkpoint(file)) to go on from "
                "it all the same",
            )

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse what is no state of these levels.

        Raises:
            TrainingError: saying what does not fit.
        """
        if not isinstance(state, Mapping) or "levels" not in state or "random" not in state:
            raise TrainingError("this is no state of a training", advice="training.state_dict()")
        if state.get("format") != _FORMAT:
            raise TrainingError(f"the state is of format {state.get('format')}, this is {_FORMAT}")
        mine, theirs = [x.name for x in self.levels], list(state["levels"])
        if mine != theirs:
            raise TrainingError(
                f"the state is of levels {theirs}, not of {mine}", advice="the levels that it was saved from"
            )
        for x in self.levels:
            saved = state["levels"][x.name]
            shapes = [tuple(p.shape) for p in x.params]
            found = [tuple(p.shape) for p in saved["params"]]
            if shapes != found:
                raise x.refuse(f"its parameters have shapes {shapes}, those of the state {found}", "the same model")
            if saved["optimizer"]["kind"] != type(x.optimizer).__name__:
                was = saved["optimizer"]["kind"]
                raise x.refuse(f"its optimizer is {type(x.optimizer).__name__}, that of the state {was}")
            if len(saved["optimizer"]["groups"]) != len(x.optimizer.param_groups):
                raise x.refuse("its optimizer has another number of parameter groups than that of the state")
            if (saved["scheduler"] is None) != (x.scheduler is None):
                raise x.refuse("only one of it and the state has a scheduler")
        cold = [x.name for x in self.starts]
        if list(state["starts"]) != cold:
            raise TrainingError(f"the state has cold starts of {list(state['starts'])}, not of {cold}")
        missing = [k for k in self.written if k not in state["written"]]
        if missing or state["kinds"] != [randomness.kind_of(g) for g in self.generators]:
            raise TrainingError(
                f"the state lacks what the losses now write to or draw from: {', '.join(missing) or 'a generator'}",
                advice="the losses that it was saved with",
            )


def _level(x: Level) -> dict[str, Any]:
    return {**_trained(x), "data": x.feed.state_dict()}


def _trained(x: Level) -> dict[str, Any]:
    return {
        "params": [p.detach().clone() for p in x.params],
        "optimizer": {**OptimizerState.of(x.optimizer).plain(), "kind": type(x.optimizer).__name__},
        "scheduler": None if x.scheduler is None else copied(x.scheduler.state_dict()),
    }


def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for t, value in zip(into, values, strict=True):
            t.copy_(value)
