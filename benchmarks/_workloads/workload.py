"""A bilevel training run twice over: the loop as people write it, and the same as pure functions.

mlc compiles the loop. Everything else (the float64 reference, PyTorch's own ways, TorchOpt and, by way of
``_twins``, JAX) gets the functions, so all compute the same gradient of the same numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from _workloads.optimizers import Adam, Sgd

Tensors = list[Tensor]
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """One workload.

    Attributes:
        name: As on the command line.
        shape: Its sizes, for the reader of a result.
        fn: The loop as people write it; returns the validation loss.
        args: What to call it with.
        model: What the loop trains, or the original of what it trains.
        meta: Meta-parameters, leaves that require grad; gradients are compared in this order.
        batches: One tuple of tensors per inner step.
        validation: The batch of the outer loss.
        start: Meta-parameters to the first inner parameters.
        loss: (parameters, meta-parameters, batch) to the inner loss.
        outer: (parameters, validation batch) to the outer loss.
        optimizer: What steps.
        initial: The model's values before any call.
    """

    name: str
    shape: dict[str, Any]
    fn: Callable[..., Tensor]
    args: tuple[Any, ...]
    model: nn.Module
    meta: Tensors
    batches: list[Batch]
    validation: Batch
    start: Callable[[Sequence[Tensor]], Tensors]
    loss: Callable[[Sequence[Tensor], Sequence[Tensor], Batch], Tensor]
    outer: Callable[[Sequence[Tensor], Batch], Tensor]
    optimizer: Adam | Sgd
    initial: dict[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.batches)

    def reset(self) -> None:
        """Undo what a call of the loop left in the model, so that every call computes the same."""
        self.model.load_state_dict(self.initial)


def copies(model: nn.Module) -> Tensors:
    """The parameters' values as leaves of their own."""
    return [p.detach().clone().requires_grad_() for p in model.parameters()]


def applied(model: nn.Module) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    """The model as a function of its parameters and its input."""
    names = [name for name, _ in model.named_parameters()]

    def call(params: Sequence[Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, params, strict=True)), (x,))

    return call


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
