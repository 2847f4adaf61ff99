"""Small float64 problems for trainings, and the plain functional unroll that they are held against."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mlc

DIM = 3
Values = dict[str, Tensor]
Loss = Callable[[Values, Tensor], Tensor]


def data(seed: int, n: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, DIM, generator=generator, dtype=torch.float64) for _ in range(n)]


class Problem:
    """Named parameters of ``DIM`` elements, losses of all of them, and data for each level."""

    def __init__(self, **losses: Loss) -> None:
        self.losses = losses
        generator = torch.Generator().manual_seed(7)
        self.start = {n: 0.5 * torch.randn(DIM, generator=generator, dtype=torch.float64) for n in losses}
        self.params = {n: nn.Parameter(v.clone()) for n, v in self.start.items()}
        self.data = {n: data(k) for k, n in enumerate(losses)}
        self.rates = {n: 0.1 for n in losses}

    def level(self, name: str, steps: int = 1, **options: Any) -> mlc.Level:
        """A level of plain gradient descent."""
        p, loss = self.params[name], self.losses[name]
        optimizer = options.pop("optimizer", None) or torch.optim.SGD([p], lr=self.rates[name])
        return mlc.Level(name, p, optimizer, lambda b: loss(self.params, b), self.data[name], steps, **options)  # type: ignore[arg-type]


class Unroll:
    """The same by hand: values as a dict, updates that keep PyTorch's graph."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.values: Values = {n: v.clone() for n, v in problem.start.items()}
        self.batches: dict[str, Iterator[Tensor]] = {n: itertools.cycle(d) for n, d in problem.data.items()}

    def begin(self, *tops: str) -> None:
        """An outer step begins: earlier ones are constants, and these parameters are leaves."""
        self.values = {n: v.detach() for n, v in self.values.items()}
        for n in tops:
            self.values[n].requires_grad_()

    def mark(self, name: str) -> None:
        """From here on a gradient by this level's parameters goes through what is computed of them."""
        v = self.values[name]
        self.values[name] = v + 0 if v.requires_grad else v.detach().requires_grad_()

    def loss(self, name: str) -> Tensor:
        """The loss of a level on its next batch."""
        return self.problem.losses[name](self.values, next(self.batches[name]))

    def gradient(self, name: str) -> Tensor:
        """Through everything that its parameters have touched since they were updated."""
        if not self.values[name].requires_grad:
            self.values[name] = self.values[name].detach().requires_grad_()
        (found,) = torch.autograd.grad(self.loss(name), self.values[name], create_graph=True)
        return found

    def take(self, name: str, gradient: Tensor) -> None:
        """A step of gradient descent."""
        self.values[name] = self.values[name] - self.problem.rates[name] * gradient

    def train(self, name: str, steps: int = 1) -> None:
        """Steps of a level whose gradient needs nothing below."""
        for _ in range(steps):
            self.mark(name)
            self.take(name, self.gradient(name))


def square(x: Tensor) -> Tensor:
    return x.square().mean()
