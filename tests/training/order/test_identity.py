"""Checkpoints of another program are refused, though its levels have the same names and shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mlc
from mlc.training.order.identity import numbers_in
from tests.training.problems import Problem, square
from tests.training.test_graphs import bilevel

LOSS = bilevel().losses["w"]


def made(steps: int = 1, loss: Any = LOSS, **options: Any) -> mlc.Training:
    p = Problem(**{**bilevel().losses, "w": loss})
    lr = options.pop("lr", 0.1)
    optimizer = options.pop("kind", torch.optim.SGD)([p.params["w"]], lr=lr)
    return mlc.Training([p.level("w", steps, optimizer=optimizer, **options), p.level("u")])


def other(v: Any, b: Tensor) -> Tensor:
    return square(b @ v["w"] - v["u"].sum())


OTHERS: dict[str, tuple[Callable[[], mlc.Training], str]] = {
    "loss": (lambda: made(loss=other), "the loss of level 'w' computes something else there"),
    "steps": (lambda: made(2), "level 'w' has steps 1 there, and 2 here"),
    "rate": (lambda: made(lr=0.2), r"level 'w' has optimizer SGD\(.*lr=0.1.* there, and SGD\(.*lr=0.2"),
    "clip": (lambda: made(clip=1.0), "level 'w' has clip None there, and 1.0 here"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    made().run(1, checkpoint=path)
    return path


@pytest.mark.parametrize("name", OTHERS)
def test_another_program_is_refused(name: str, folder: Path) -> None:
    build, said = OTHERS[name]
    with pytest.raises(mlc.TrainingError, match=f"step-0000000001.mlc is of another program: {said}"):
        build().run(3, checkpoint=folder)


def test_another_optimizer_is_refused_by_a_state_too(folder: Path) -> None:
    state = mlc.training.load_checkpoint(folder / "step-0000000001.mlc")
    training = made(lr=0.2)
    training.load_state_dict(state)  # by hand: what is the program's own business is taken over
    assert training.step == 1
    with pytest.raises(mlc.TrainingError, match="its optimizer is Adam, that of the state SGD"):
        made(kind=torch.optim.Adam).load_state_dict(state)


def test_numbers_in_code() -> None:
    def a(x: float) -> float:
        return 2.5 * x

    def b(x: float) -> float:
        return 3.5 * x

    assert numbers_in(a) != numbers_in(b)
    assert numbers_in(torch.nn.ReLU()) == ""
