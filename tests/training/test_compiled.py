"""A level with particles that live on: every outer step is a window, and a state continues bit for bit."""

import pytest
import torch
from torch import Tensor

import mlc
from tests.training.problems import Problem

PERSISTENT = mlc.Evolution(sigma=0.01, samples=2, persistent=True)


def build() -> tuple[mlc.Training, dict[str, Tensor]]:
    p = Problem(
        w=lambda v, b: (b @ (v["w"] - v["u"])).square().mean() + 0.1 * v["w"].square().sum(),
        u=lambda v, b: (b @ v["w"] - 1).square().mean(),
    )
    adam = torch.optim.Adam([p.params["w"]], lr=0.05, eps=1e-3)
    training = mlc.Training([p.level("w", 2, optimizer=adam, response=PERSISTENT), p.level("u")])
    return training, {k: v.detach() for k, v in p.params.items()}


def test_a_state_in_the_middle_of_an_unroll_continues_bit_for_bit() -> None:
    torch.manual_seed(3)
    whole, expected = build()
    whole.run(1)
    state = whole.state_dict()
    whole.run(2)
    assert whole.function.report is not None and whole.function.report.windows == {"w": 3}
    torch.manual_seed(99)  # another process has other numbers
    second, tensors = build()
    second.load_state_dict(state)
    second.run(2)
    assert second.function.report is not None and second.function.report.windows == {"w": 3}
    assert all(torch.equal(tensors[k], expected[k]) for k in expected)


@pytest.mark.parametrize("how", [{"start": "cold"}, {"rollback": True}], ids=["cold", "rollback"])
def test_windows_of_one_training_cannot_start_anew(how: dict[str, object]) -> None:
    p = Problem(w=lambda v, b: v["w"].square().sum(), u=lambda v, b: v["w"].sum())
    with pytest.raises(mlc.TrainingError, match=r"persistent=True.*beside") as caught:
        p.level("w", response=PERSISTENT, **how)
    assert caught.value.advice
