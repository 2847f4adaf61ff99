"""Optimizer steps as differentiable functions of lists of tensors, written from torch.optim's documentation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor]
State = list[Tensors]


@dataclass(frozen=True)
class Adam:
    """Adam with eps outside the root and after the bias correction, as torch.optim.Adam."""

    lr: float
    beta1: float
    beta2: float
    eps: float

    def init(self, params: Sequence[Tensor]) -> State:
        return [[torch.zeros_like(p) for p in params] for _ in range(2)]

    def update(
        self, t: int, grads: Sequence[Tensor], params: Sequence[Tensor], state: State, meta: Sequence[Tensor]
    ) -> tuple[Tensors, State]:
        """Parameters and state after step ``t`` (from 1)."""
        rate, root = self.lr / (1 - self.beta1**t), (1 - self.beta2**t) ** 0.5
        first = [self.beta1 * m + (1 - self.beta1) * g for m, g in zip(state[0], grads, strict=True)]
        second = [self.beta2 * v + (1 - self.beta2) * g * g for v, g in zip(state[1], grads, strict=True)]
        moved = [p - rate * m / (v.sqrt() / root + self.eps) for p, m, v in zip(params, first, second, strict=True)]
        return moved, [first, second]

    def ordinary(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The same as people use it, for the time of an ordinary training step."""
        return torch.optim.Adam(params, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps)


@dataclass(frozen=True)
class Sgd:
    """SGD whose hyperparameters may depend on the meta-parameters.

    Attributes:
        hyper: Meta-parameters to (learning rates, momentum, weight decay); learning rates are one for all or a
            list with one tensor per parameter.
        momentum: Whether there is a momentum at all.
    """

    hyper: Callable[[Sequence[Tensor]], tuple[Any, Any, Any]]
    momentum: bool

    def init(self, params: Sequence[Tensor]) -> State:
        return [[torch.zeros_like(p) for p in params]] if self.momentum else []

    def update(
        self, t: int, grads: Sequence[Tensor], params: Sequence[Tensor], state: State, meta: Sequence[Tensor]
    ) -> tuple[Tensors, State]:
        """Parameters and state after step ``t``."""
        rates, momentum, decay = self.hyper(meta)
        rates = rates if isinstance(rates, list) else [rates] * len(params)
        if isinstance(decay, Tensor) or decay:
            grads = [g + decay * p for g, p in zip(grads, params, strict=True)]
        if self.momentum:
            grads = [momentum * v + g for v, g in zip(state[0], grads, strict=True)]
        moved = [p - r * g for p, r, g in zip(params, rates, grads, strict=True)]
        return moved, [list(grads)] if self.momentum else []

    def ordinary(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Plain SGD as people use it; the numbers do not change how long a step takes."""
        return torch.optim.SGD(params, lr=1e-2, momentum=0.9 if self.momentum else 0.0)
