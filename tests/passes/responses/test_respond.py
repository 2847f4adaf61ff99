"""Responses as rewrites: what is refused, what is told, what a plan holds, what memory they take."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlc
from mlc.ir.core import Custom, Stop
from mlc.passes.autodiff.policy import Policy
from mlc.passes.responses.respond import respond

D = torch.float64


def made(steps: int = 4, n: int = 3) -> tuple[Any, ...]:
    torch.manual_seed(0)
    w, eta = nn.Parameter(torch.zeros(n, dtype=D)), torch.randn(n, dtype=D, requires_grad=True)
    return w, eta, [torch.randn(n, dtype=D) for _ in range(steps)]


def fit(w: Tensor, eta: Tensor, batches: Any) -> Tensor:
    opt = torch.optim.SGD([w], lr=0.1)
    with mlc.level("inner"):
        for x in batches:
            opt.zero_grad()
            (0.5 * (w - x).square().sum() + 0.5 * (eta.exp() * w.square()).sum()).backward()
            opt.step()
    return (w - 1).square().sum()


def planned(response: mlc.Response, steps: int = 4) -> mlc.Plan:
    cf = mlc.compile(fit, backend="interpreter", flows={"inner": response})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlc.MlcWarning)
        cf(*made(steps, 12)).backward()
    assert cf.plan is not None
    return cf.plan


def test_a_response_leaves_the_program_its_values_and_ends_the_run_in_one_rule() -> None:
    program = mlc.trace(fit, *made())
    answered = respond(program, {"L1": mlc.Implicit()}, Policy()).region
    assert [e.op.title for e in answered.eqns if isinstance(e.op, Custom)] == ["Implicit of inner"]
    assert any(isinstance(e.op, Stop) and e.op.always for e in answered.eqns)
    assert not any(isinstance(e.op, Custom) for e in program.region.eqns)


def test_names_as_explain_prints_them_and_a_plan_comes_back_with_its_responses(tmp_path: Path) -> None:
    plan = planned(mlc.Implicit("cg", steps=7))
    assert "L1 inner" in str(plan.explain()) and "Implicit('cg', steps=7)" in str(plan.explain())
    plan.save(tmp_path / "p.json")
    again = mlc.Plan.load(tmp_path / "p.json")
    assert again.modes.responses == {"L1": mlc.Implicit("cg", steps=7)} and again == plan
    old = plan.model_dump()
    del old["responses"]
    assert mlc.Plan.model_validate(old).modes.responses == {}


@pytest.mark.parametrize("data", ["last", "all"])
def test_memory_does_not_grow_with_the_steps(data: str) -> None:
    few, many = planned(mlc.Implicit(data=data), 4).peak_bytes, planned(mlc.Implicit(data=data), 40).peak_bytes
    assert many <= few
    assert planned(mlc.Unroll(), 40).peak_bytes > 2 * planned(mlc.Unroll(), 4).peak_bytes


def test_solves_are_told_and_what_is_wrong_with_them_is_warned_of() -> None:
    cf = mlc.compile(fit, backend="interpreter", flows={"inner": mlc.Implicit("cg", steps=1, tol=1e-12)})
    with pytest.warns(mlc.MlcWarning) as caught:
        cf(*made()).backward()
    said = " ".join(str(w.message) for w in caught)
    assert "not at a stationary point" in said and "left a residual" in said
    assert cf.report is not None
    s = cf.report.solves["inner"]
    assert s.iterations == 1 and s.residual > 1e-12 and s.curvature is not None and s.curvature > 1


def test_negative_curvature_is_warned_of() -> None:
    def saddle(w: Tensor, eta: Tensor) -> Tensor:
        opt = torch.optim.SGD([w], lr=0.1)
        with mlc.level("inner", response=mlc.Implicit("cg")):
            for _ in range(3):
                opt.zero_grad()
                ((w[0] - eta[0]).square() - 0.5 * (w[1] - eta[1]).square()).backward()
                opt.step()
        return w.sum()

    w, eta = nn.Parameter(torch.zeros(2, dtype=D)), torch.ones(2, dtype=D, requires_grad=True)
    with pytest.warns(mlc.MlcWarning) as caught:
        mlc.compile(saddle, backend="interpreter")(w, eta).backward()
    assert any("negative curvature" in str(w.message) for w in caught)


def decayed(w: Tensor, eta: Tensor, batches: Any) -> Tensor:
    opt = torch.optim.AdamW([w], lr=0.1, weight_decay=0.1)
    with mlc.level("inner"):
        for x in batches:
            opt.zero_grad()
            ((w - x).square().sum() + (eta.exp() * w.square()).sum()).backward()
            opt.step()
    return w.sum()


def projected(w: Tensor, eta: Tensor, batches: Any) -> Tensor:
    with mlc.level("inner"):
        for x in batches:
            (g,) = torch.autograd.grad((w - x - eta).square().sum(), w)
            with torch.no_grad():
                w.copy_((w - 0.1 * g).clamp(min=0))
    return w.sum()


def only_rate(w: Tensor, eta: Tensor, batches: Any) -> Tensor:
    opt = torch.optim.SGD([w], lr=eta.exp().sum())
    with mlc.level("inner"):
        for x in batches:
            opt.zero_grad()
            (w - x).square().sum().backward()
            opt.step()
    return w.sum()


def accumulated(eta: Tensor, batches: list[Tensor]) -> Tensor:
    """The gradients of a step are taken in a loop of their own; eta reaches the result beside the level, too."""
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.SGD([w], lr=0.1)
    with mlc.level("inner"):
        for _ in range(4):
            opt.zero_grad()
            for x in batches:
                ((w - x).square().sum() + eta.exp() * w.square().sum()).backward()
            opt.step()
    return w.sum() + eta.square()


def test_gradients_that_are_accumulated_are_not_left_out_of_two_first_order_runs() -> None:
    eta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batches = [torch.randn(2, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(mlc.PlanError, match="in a loop of its own") as caught:
        mlc.compile(accumulated, backend="interpreter", flows={"inner": mlc.FullyFirstOrder(penalty=10.0)})(
            eta, batches
        )
    assert caught.value.loc is not None


@pytest.mark.parametrize("fn", [decayed, projected, only_rate], ids=lambda f: f.__name__)
def test_a_level_that_does_not_come_to_rest_at_its_gradient_is_refused(fn: Any) -> None:
    with pytest.raises(mlc.PlanError) as caught:
        mlc.compile(fn, backend="interpreter", flows={"inner": mlc.Implicit()})(*made())
    assert caught.value.advice and caught.value.loc is not None


@pytest.mark.parametrize(
    ("flows", "said"),
    [({"outer": mlc.FirstOrder()}, "no level"), ({"inner": mlc.Implicit}, r"without \(\)"), ({"inner": "cg"}, "flows"),
     ({"inner": mlc.Implicit(), "eta": "forward"}, "forward"),
     ({"inner": mlc.FirstOrder()}, "no meta-parameter has a derivative left")],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(flows: Any, said: str) -> None:
    with pytest.raises(mlc.PlanError, match=said):
        mlc.compile(fit, backend="interpreter", flows=flows)(*made())


def test_a_block_in_which_nothing_is_trained_is_refused() -> None:
    def idle(eta: Tensor) -> Tensor:
        with mlc.level("idle", response=mlc.Implicit()):
            y = eta.exp().sum()
        return y

    with pytest.raises(mlc.PlanError, match="nothing is trained"):
        mlc.compile(idle)(torch.ones(2, requires_grad=True))


def test_check_states_the_distance_of_an_approximation() -> None:
    report = mlc.check(mlc.compile(fit, backend="interpreter", flows={"inner": mlc.Truncated(1)}), *made())
    assert report.ok and report.distance is not None and report.distance > 0.1
    assert report.cosine is not None and -1 < report.cosine < 1 and "cosine" in str(report)
