"""Predicted beside real changes of a function, on copies."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import mlc


def fit(w: nn.Parameter, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    opt = torch.optim.SGD([w], lr=0.05)
    for _ in range(5):
        opt.zero_grad()
        left = torch.dropout(x, 0.2, True) @ w - y
        (0.5 * left.square().sum() + 0.5 * (penalty.exp() * w.square()).sum()).backward()
        opt.step()
    return (w - 1).square().sum()


def data() -> tuple[nn.Parameter, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        nn.Parameter(torch.zeros(3)),
        torch.zeros(3, requires_grad=True),
        torch.randn(8, 3, generator=g),
        torch.ones(8),
    )


def test_small_steps_are_predicted_and_nothing_changes() -> None:
    args = data()
    before = [t.detach().clone() for t in args]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = mlc.smoothness(mlc.compile(fit, backend="interpreter"), *args, step=0.1, directions=1)
    assert torch.equal(state, torch.get_rng_state()) and args[1].grad is None and args[0].dtype is torch.float32
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    assert found.ok and found.holds == 0.1 and found.improves
    # the linear error of a smooth function halves with the step: the same dropout masks at every run
    down = [p for p in found.points if p.direction == "negative gradient"]
    assert [p.step for p in down] == [0.0125, 0.025, 0.05, 0.1]
    for a, b in itertools.pairwise(down):
        assert b.error == pytest.approx(2 * a.error, rel=0.05) and b.error < 0.05
    assert down[-1].predicted == pytest.approx(-0.1 * found.norm**2)
    assert "predicts steps up to 0.1 within 25%" in str(found) and found.as_dict()["ok"]


def test_a_chaotic_unroll_predicts_nothing() -> None:
    def chaos(r: Tensor, x0: Tensor) -> Tensor:
        x = x0.clone().requires_grad_()
        opt = torch.optim.SGD([x], lr=1.0)
        for _ in range(30):
            opt.zero_grad()
            (x * x / 2 - r * (x * x / 2 - x**3 / 3)).sum().backward()
            opt.step()
        return x.sum()

    found = mlc.smoothness(chaos, torch.tensor(3.9, requires_grad=True), torch.tensor([0.3]), step=1e-8, directions=0)
    assert not found.ok and found.holds == 0.0 and "predicts no step tried" in str(found) and "off" in str(found)


def test_it_tells_up_to_where() -> None:
    def wave(m: Tensor) -> Tensor:
        return m.sin().sum()

    found = mlc.smoothness(wave, torch.zeros(1, requires_grad=True), step=2.0, directions=0)
    # sin(s) / s is 0.958 at 1/2, 0.84 at 1 and 0.45 at 2
    assert found.holds == 1.0 and not found.ok and "up to 1 within 25%, not 2" in str(found)


def test_cuts_and_declared_levels_are_told() -> None:
    def cut(m: Tensor) -> Tensor:
        return (m.detach() * m).sum()

    found = mlc.smoothness(cut, torch.ones(1, requires_grad=True), step=0.1, directions=0)
    assert not found.ok and "see through the cut" in found.notes[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": 0}, mlc.PlanError, "step=0"),
        ({"step": 1.0, "directions": -1}, mlc.PlanError, "directions=-1"),
        ({"step": 1.0, "tolerance": 0}, mlc.PlanError, "tolerance=0"),
        ({"step": 1.0, "dtype": torch.float16}, mlc.PlanError, "float16"),
        ({"step": 1.0}, mlc.DifferentiationError, r"(?s)more than one number.*at .*test_smoothness"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    def two(m: Tensor) -> tuple[Tensor, Tensor]:
        return m.sum(), m.square().sum()

    with pytest.raises(error, match=message):
        mlc.smoothness(two, torch.ones(1, requires_grad=True), **options)  # type: ignore[arg-type]


def test_a_gradient_of_zero_predicts_nothing() -> None:
    with pytest.raises(mlc.DifferentiationError, match="is zero"):
        mlc.smoothness(lambda m: m.square().sum(), torch.zeros(1, requires_grad=True), step=1.0)
