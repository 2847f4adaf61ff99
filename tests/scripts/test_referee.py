"""The referee itself: it accepts what is right, and notices each thing that a compiler could get wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.scripts.data import Settings
from tests.scripts.referee import FIRST, SECOND, Plain, plain, problems
from tests.scripts.script import Script
from torch import Tensor, nn


def main(args: Settings, model: nn.Linear, x: Tensor) -> Tensor:
    """Fast weights: plain PyTorch differentiates all of it."""
    weight = model.weight
    for i in range(2):
        (g,) = torch.autograd.grad((x @ weight.T).square().mean(), weight, create_graph=True)
        weight = weight - args.lr * g + 0.01 * torch.randn(weight.shape)
        args.log.append(float(g.norm()))
        print(f"step {i}: {args.log[-1]:.3f} in 3.21 ms")
    with torch.no_grad():
        model.weight.copy_(weight)
    torch.save(model.state_dict(), "model.pt")
    return (x @ weight.T).square().mean()


def make() -> dict[str, Any]:
    args = Settings(lr=torch.tensor(0.1, requires_grad=True), log=[])
    return {"args": args, "model": nn.Linear(3, 1), "x": torch.randn(4, 3)}


SCRIPT = Script("fast", main, make, lambda a: {"lr": a["args"].lr})


@pytest.fixture
def expected() -> dict[int, Plain]:
    return {seed: plain(SCRIPT, seed) for seed in (FIRST, SECOND)}


def after(change: Callable[..., None]) -> Callable[..., Any]:
    """A compiler whose calls do what the function does, and then something more."""

    def compile_(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(**args: Any) -> Any:
            out = fn(**args)
            change(**args)
            return out

        return call

    return compile_


def constant(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **args: fn(**args).detach() + 0 * args["args"].lr


def unconnected(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **args: fn(**args).detach() + torch.zeros((), requires_grad=True)


def late(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Right once: the first call's value again."""
    first: list[Tensor] = []

    def call(**args: Any) -> Tensor:
        first.append(fn(**args))
        return first[0] + 0 * first[-1]

    return call


def move(model: nn.Linear, **_: Any) -> None:
    model.bias.data.add_(1e-6)


def replace(model: nn.Linear, **_: Any) -> None:
    model.weight = nn.Parameter(model.weight.detach().float())


def empty(**_: Any) -> None:
    Path("model.pt").unlink()


def test_it_accepts_what_is_right(expected: dict[int, Plain]) -> None:
    assert all(slope.sharp for found in expected.values() for slope in found.slopes)
    assert not list(problems(SCRIPT, lambda fn: fn, expected))


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (constant, "call 1: the gradient is not the slope"),
        (unconnected, "call 1: no gradient of lr"),
        (late, "call 2 leaves returned: off by more"),
        (after(move), "call 1 leaves args.model.bias: off by more"),
        (after(replace), "call 1 leaves args.model.weight: torch.float32"),
        (after(empty), "call 1 leaves file model.pt"),
        (after(lambda **_: torch.rand(())), "call 1 leaves generator: values differ"),
        (after(lambda args, **_: args.log.pop()), "call 1 leaves args.args.log.1 is missing"),
        (after(lambda model, **_: model.eval()), "call 1 leaves args.model.training: False for True"),
        (after(lambda **_: print("more")), "call 1 prints 'more' for ''"),
        (after(lambda **_: 1 / 0), "call 1: ZeroDivisionError: division by zero"),
    ],
)
def test_it_notices(compiler: Callable[..., Any], says: str, expected: dict[int, Plain]) -> None:
    assert next(problems(SCRIPT, compiler, expected), "nothing").startswith(says)


def test_durations_are_no_matter(expected: dict[int, Plain]) -> None:
    assert "in (time)" in expected[FIRST].outcome.printed
