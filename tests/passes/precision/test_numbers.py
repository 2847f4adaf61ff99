"""Policies in numbers: the hypergradient beside float64, memory by types, and what is warned of."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import mlc
from tests.passes.precision.training import adam, cosine, data, hypergradient, model, ratio, sgd

POLICIES = {
    "bf16": "bf16",
    "level": {"L1": mlc.Precision(compute="bf16"), "L1 -> L0": "float32"},
    "flow": {"L1 -> L0": "bf16"},
    "stored": mlc.Precision(compute="bf16", store="bf16"),
    "int8": mlc.Precision(store="int8"),
}


@pytest.fixture(scope="module")
def exact() -> dict[Any, Tensor]:
    return {loop: hypergradient(loop, torch.float64)[0] for loop in (sgd, adam)}


@pytest.mark.parametrize("levers", [{}, {"slots": 1, "price": 1e-7, "parts": 2}], ids=["fastest", "least"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("loop", [sgd, adam])
def test_cosine_and_norm(exact: dict[Any, Tensor], loop: Any, policy: str, levers: dict[str, Any]) -> None:
    found, f = hypergradient(loop, precision=POLICIES[policy], levers=levers or None)
    assert cosine(found, exact[loop]) >= 0.999 and abs(ratio(found, exact[loop]) - 1) <= 0.02
    assert not torch.equal(found.float(), hypergradient(loop)[0].float()) or policy == "int8"
    assert "precision cost" in f.plan.explain()


def test_a_wider_update_is_nearer_to_float64(exact: dict[Any, Tensor]) -> None:
    found, f = hypergradient(adam, precision=mlc.Precision(update="float64"))
    assert cosine(found, exact[adam]) > 1 - 1e-9
    assert any(d.subject == "update of L1" for d in f.plan.decisions)


def test_forward_mode_computes_narrowly_too(exact: dict[Any, Tensor]) -> None:
    found, f = hypergradient(sgd, precision="bf16", flows="forward")
    assert f.plan.mode == "forward" and cosine(found, exact[sgd]) >= 0.999
    _, other = hypergradient(sgd, precision={"L1 -> L0": "bf16"}, flows="forward")
    assert other.plan.mode == "mixed" and any("another precision" in d.reason for d in other.plan.decisions)


def test_reverse_over_reverse(exact: dict[Any, Tensor]) -> None:
    found, f = hypergradient(sgd, precision="bf16", flows="reverse")
    assert f.plan.mode == "reverse" and cosine(found, exact[sgd]) >= 0.999


def test_later_calls_are_the_policys_and_leave_float32() -> None:
    net = model()
    f = mlc.compile(sgd, precision="bf16", backend="interpreter")
    first, second = f(net, *data()), f(net, *data())
    assert f.recordings == 1 and first.dtype == second.dtype == torch.float32
    assert 0 < abs(first.item() - second.item()) < 0.02
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_a_cosine_below_the_least_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlc.compiled.precise.COSINE", 1.0)
    with pytest.warns(mlc.PrecisionWarning, match="far from the exact one on this call: cosine 0.99"):
        mlc.compile(sgd, precision="bf16", backend="interpreter")(model(), *data())


def test_a_cost_that_cannot_be_measured_is_a_warning() -> None:
    program = mlc.trace(sgd, model(), *data())
    least = mlc.plan(program, precision="bf16", memory="min").peak_bytes
    exact = mlc.plan(program, memory="min").peak_bytes
    if least >= exact:
        pytest.skip("the policy saves nothing here")
    with pytest.warns(mlc.PrecisionWarning, match="the exact plan needs at least"):
        mlc.compile(sgd, precision="bf16", memory=(least + exact) // 2)(model(), *data())


def test_check_reports_the_cost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = mlc.check(sgd, model(), *data(), precision="bf16")
    assert report.ok and report.precision is not None and report.precision.against == "float64"
    assert 0.999 <= report.precision.cosine < 1 and "under bf16 (ok)" in str(report)
    assert report.as_dict()["precision"]["ok"]


def test_parts_of_a_batch_under_autocast_agree_with_the_whole() -> None:
    """Sums of half precision are made of float32 parts: two bfloat16 parts cancel to zero now and then."""

    def loop(net: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
        fast = mlc.clone(net)
        opt = torch.optim.Adam(fast.parameters(), lr=1e-3, eps=1e-8)
        for a, b in zip(x, y, strict=True):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(fast(a), b)
            loss.backward()
            opt.step()
        return torch.nn.functional.cross_entropy(fast(x[0]), y[0])

    whole, _ = hypergradient(loop)
    parts, f = hypergradient(loop, levers={"parts": 2})
    assert f.plan.parts == 2 and cosine(whole, parts) > 0.999
