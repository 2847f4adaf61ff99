"""Gradients that the loop takes: where they stop, and who is told."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc

X, Y = torch.randn(5, 4), torch.randn(5, 1)


def chain(model: nn.Module, decay: Tensor, scale: Tensor, direct: bool) -> Tensor:
    top = torch.optim.SGD([decay], lr=0.1)
    for _ in range(2):
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            opt.zero_grad()
            (F.mse_loss(model(X), Y) + decay.exp() * model.weight.square().sum()).backward()
            opt.step()  # the update
        top.zero_grad()
        outer = scale * F.mse_loss(model(X), Y)
        (outer + decay.square() if direct else outer).backward()  # the gradient
        top.step()
    return F.mse_loss(model(X), Y)


@pytest.mark.parametrize("direct", [False, True])
def test_a_gradient_that_stops_at_a_training_is_told_of_with_both_lines(direct: bool) -> None:
    args = (nn.Linear(4, 1), nn.Parameter(torch.zeros(())), torch.ones((), requires_grad=True))
    with pytest.warns(mlc.MlcWarning, match="stops at the update") as caught:
        mlc.compile(chain)(*args, direct)
    text = Path(__file__).read_text()
    lines = [
        i for i, line in enumerate(text.splitlines(), start=1) if line.endswith(("# the update", "# the gradient"))
    ]
    assert any(all(f":{n} in chain" in str(w.message) for n in lines) for w in caught)


def test_players_in_turn_are_not() -> None:
    def game(maker: nn.Module, judge: nn.Module, rate: Tensor) -> Tensor:
        makes, judges = (torch.optim.SGD(m.parameters(), lr=rate) for m in (maker, judge))
        for _ in range(3):
            judges.zero_grad()
            (F.softplus(-judge(X)) + F.softplus(judge(maker(X).detach()))).mean().backward()
            judges.step()
            makes.zero_grad()
            F.softplus(-judge(maker(X))).mean().backward()
            makes.step()
        return judge(maker(X)).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlc.compile(game)(nn.Linear(4, 4), nn.Linear(4, 1), torch.tensor(0.1, requires_grad=True)).backward()
