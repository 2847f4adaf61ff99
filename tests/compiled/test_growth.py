"""Loops that grow between calls: planned again only when the budget asks for it, and right in every case."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc
from mlc.compiled.growth import open_loops, peak_at
from mlc.view.plan import stages_for
from tests.passes.planning.test_planner import problem


def train(net: nn.Module, weights: Tensor, batches: list[Any], val: Any) -> Tensor:
    opt = torch.optim.Adam(net.parameters(), lr=0.02, eps=1e-3)
    for x, y in batches:
        opt.zero_grad()
        (torch.sigmoid(weights) * F.cross_entropy(net(x), y, reduction="none")).mean().backward()
        opt.step()
    return F.cross_entropy(net(val[0]), val[1])


def args(steps: int) -> tuple[Any, ...]:
    net, _, weights, batches, _ = problem(steps)
    return copy.deepcopy(net), weights, batches, problem(1)[3][0]


def peak(steps: int) -> int:
    return mlc.plan(mlc.trace(train, *args(steps)), flows="mixed").peak_bytes


def gradient(cf: Any, given: tuple[Any, ...]) -> Tensor:
    (found,) = torch.autograd.grad(cf(*given), [given[1]])
    return found


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Budgets of every planning."""
    import mlc.compiled.compiled as compiled
    import mlc.compiled.growth as growth

    seen: list[Any] = []
    for module in (compiled, growth):
        whole = module.make_plan
        monkeypatch.setattr(module, "make_plan", lambda p, w=whole, **o: (seen.append(o["memory"]), w(p, **o))[1])
    return seen


@pytest.mark.slow
def test_a_longer_loop_that_does_not_fit_is_planned_again_once(planned: list[Any]) -> None:
    budget = int(peak(12) * 1.1)
    cf = mlc.compile(train, memory=budget, flows="mixed")
    gradient(cf, args(6))
    before = cf.plan
    with pytest.warns(mlc.MemoryWarning, match=r"longer than planned for: 40 trips .*Planned again"):
        found = gradient(cf, args(40))
    assert planned == [budget, budget] and cf.plan is not before and cf.plan.peak_bytes <= budget
    assert cf.plan.formulas.now == {next(iter(cf.plan.formulas.now)): 40}
    torch.testing.assert_close(found, gradient(mlc.compile(train, flows="mixed"), args(40)), rtol=1e-9, atol=1e-13)
    assert len(planned) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(cf, args(40))
        gradient(cf, args(6))
        gradient(cf, args(39))
    assert len(planned) == 3  # each growth once
    assert cf.report.peak_bytes <= 1.1 * budget


@pytest.mark.slow
def test_a_longer_loop_within_the_budget_is_not_planned_again(planned: list[Any]) -> None:
    cf = mlc.compile(train, memory=int(peak(40) * 1.1), flows="mixed")
    gradient(cf, args(6))
    before = cf.plan
    found = gradient(cf, args(40))
    assert len(planned) == 1 and cf.plan is before
    torch.testing.assert_close(found, gradient(mlc.compile(train, flows="mixed"), args(40)), rtol=1e-9, atol=1e-13)


def test_without_a_budget_nothing_small_is_planned_again(planned: list[Any]) -> None:
    cf = mlc.compile(train, flows="mixed")
    gradient(cf, args(3))
    gradient(cf, args(40))
    assert len(planned) == 1


@pytest.mark.slow
def test_a_length_that_cannot_fit_is_refused_and_nothing_has_changed() -> None:
    budget = int(peak(3) * 1.05)
    cf = mlc.compile(train, memory=budget, flows="mixed")
    gradient(cf, args(3))
    plan = cf.plan
    long = args(400)
    state, draws = copy.deepcopy(long[0].state_dict()), torch.get_rng_state()
    with pytest.raises(mlc.BudgetError, match="smallest predicted peak is") as e:
        cf(*long)
    assert budget < mlc.plan(mlc.trace(train, *args(400)), memory=e.value.least, flows="mixed").peak_bytes
    assert all(torch.equal(v, state[k]) for k, v in long[0].state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws)
    gradient(cf, args(3))  # the plan for the short loop still stands
    assert cf.plan is plan


@pytest.mark.slow
def test_the_peak_at_other_counts_is_that_of_a_plan_there() -> None:
    program = mlc.trace(train, *args(6))
    plan = mlc.plan(program, flows="mixed")
    (place,) = {(str(g.loc), g.depth) for g in open_loops(program).values()}
    assert peak_at(stages_for(program, plan), {place: 40}) == peak(40)
    assert peak_at(stages_for(program, plan), {place: 6}) == plan.peak_bytes


def test_a_generator_tells_no_length() -> None:
    cf = mlc.compile(train, memory=int(peak(12) * 1.1), flows="mixed")
    net, weights, batches, val = args(6)
    cf(net, weights, (b for b in batches), val)
    net, weights, batches, val = args(12)
    cf(net, weights, (b for b in batches), val)
