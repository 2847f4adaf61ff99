"""States of optimizers: taken exactly, and put back into the same optimizer or one like it.

PyTorch's ``load_state_dict`` casts what it loads and replaces hyperparameters that are tensors; here every tensor
comes back with the bits it had, and a learning rate that another level trains stays the tensor that it trains.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

__all__ = ["OptimizerState", "copied"]


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer holds besides its parameters.

    Attributes:
        groups: Hyperparameters of each group.
        state: What it keeps for each parameter, by its number.
    """

    groups: list[dict[str, Any]]
    state: dict[int, dict[str, Any]]

    @classmethod
    def of(cls, optimizer: Optimizer) -> OptimizerState:
        """A copy of what it holds now."""
        groups = [{k: copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        numbered = enumerate(_params(optimizer))
        return cls(groups, {i: copied(dict(optimizer.state[p])) for i, p in numbered if p in optimizer.state})

    def put(self, optimizer: Optimizer, trained: Collection[int] = ()) -> None:
        """Give it to an optimizer.

        Args:
            optimizer: Over parameters of the same number and shapes.
            trained: Identities of tensors that are somebody's parameters: hyperparameters among them stay.
        """
        for group, saved in zip(optimizer.param_groups, self.groups, strict=True):
            for key, value in saved.items():
                now = group.get(key)
                if isinstance(now, Tensor) and isinstance(value, Tensor):
                    if id(now) not in trained:
                        with torch.no_grad():
                            now.copy_(value)
                else:
                    group[key] = copied(value)
        optimizer.state.clear()
        params = _params(optimizer)
        for i, held in self.state.items():
            optimizer.state[params[i]] = copied(held)

    def plain(self) -> dict[str, Any]:
        """As dicts, lists, numbers and tensors."""
        return {"groups": self.groups, "state": self.state}

    @classmethod
    def from_plain(cls, saved: Mapping[str, Any]) -> OptimizerState:
        """The reverse of :meth:`plain`."""
        return cls(saved["groups"], saved["state"])


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def copied(x: Any) -> Any:
    """The same with tensors of its own."""
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, x)
