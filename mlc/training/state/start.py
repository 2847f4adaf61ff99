"""How a level stood at the beginning: what a cold start goes back to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mlc.training.level import Level
from mlc.training.state.optimizer import OptimizerState

__all__ = ["Start"]


class Start:
    """How a level stood at the beginning: what a cold start goes back to."""

    def __init__(self, level: Level) -> None:
        self.level = level
        self.params = [p.detach().clone() for p in level.params]
        self.optimizer = OptimizerState.of(level.optimizer)
        self.scheduler = None if level.scheduler is None else dict(level.scheduler.state_dict())

    def put(self) -> None:
        """Go back there."""
        with torch.no_grad():
            for p, value in zip(self.level.params, self.params, strict=True):
                p.copy_(value)
        self.optimizer.put(self.level.optimizer)
        self.rewind()

    def rewind(self) -> None:
        """The scheduler alone, and with it the learning rates."""
        if self.level.scheduler is not None:
            assert self.scheduler is not None
            self.level.scheduler.load_state_dict(dict(self.scheduler))
            for now, then in zip(self.level.optimizer.param_groups, self.optimizer.groups, strict=True):
                now["lr"] = then["lr"]

    def plain(self) -> dict[str, Any]:
        """The beginning as numbers, text and tensors, for a state."""
        params = [p.clone() for p in self.params]
        return {"params": params, "optimizer": self.optimizer.plain(), "scheduler": self.scheduler}

    def take_over(self, saved: Mapping[str, Any]) -> None:
        """The beginning of the training that this one continues."""
        for mine, value in zip(self.params, saved["params"], strict=True):
            mine.copy_(value)
        self.optimizer, self.scheduler = OptimizerState.from_plain(saved["optimizer"]), saved["scheduler"]
