"""Betty (Choe et al. 2023, https://github.com/leopard-ai/betty) as its users write it: problems and an engine.

Its newest release declares Python below 3.11; it runs on later ones. ``make bench`` installs it into a folder of its
own, ``peers`` in the environment, which is looked at after everything else.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _reweighting import Problem, Way, inner_optimizer, meta_optimizer
from torch import Tensor, nn

sys.path.append(str(Path(sys.prefix) / "peers"))

from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem

Loss = Callable[[Any], Tensor]


def nobody(grads: Sequence[Tensor]) -> None:
    pass


def problem(
    name: str, module: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, data: Iterable[Any], config: Config,
    seen: Callable[[Sequence[Tensor]], None] = nobody,
) -> ImplicitProblem:  # fmt: skip
    """A problem of Betty whose loss is a function of the batch; ``seen`` gets its gradients before each step."""

    class Written(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return loss(batch)

        def grad_callback(self) -> None:
            seen([p.grad for p in self.trainable_parameters()])

    return Written(name, config, module, optimizer, train_data_loader=data)


def engine(lower: ImplicitProblem, upper: ImplicitProblem) -> Engine:
    logging.disable(logging.INFO)
    links = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    return Engine([upper, lower], EngineConfig(train_iters=1, valid_step=10**9), links)


def reweighting(p: Problem, steps: int, **config: Any) -> Way:
    """Reweighting with one of Betty's approximations, its default ``darts`` for instance."""
    lower = problem("net", p.net, inner_optimizer(p), p.lower, p.train, Config(unroll_steps=steps, **config))
    upper = problem("weigh", p.weigh, meta_optimizer(p), p.upper, p.clean, Config())
    made = engine(lower, upper)
    made.train()

    def advance() -> None:
        for _ in range(steps):
            made.global_step += 1
            made.train_step()

    return Way(advance, upper.optimizer)
