"""Formulas in trip counts: equal to plans that are made at other counts, break-even points confirmed on both sides."""

import json
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc
from mlc.ir.lowered.contract import Levers
from mlc.ir.lowered.slots import replayed_steps
from mlc.ir.lowered.stages import Stages
from mlc.passes.cost.equations import Meter
from mlc.passes.cost.memory import peak_bytes
from mlc.passes.formulas.breakeven import BreakEven, break_evens, tangent_break
from mlc.passes.formulas.formulas import Formula, Replayed, Symbols, formula_of, tangent_costs
from mlc.passes.formulas.tripcounts import Trips, planned_for
from mlc.passes.planning.planned import joint_of
from mlc.view.plan import Plan, make_plan, stages_for
from tests.passes.finishing import finish
from tests.passes.planning.test_planner import loop, problem

T = sympy.Symbol("T", integer=True, positive=True)
METER = Meter(torch.device("cpu"))


def cost(stages: Stages) -> tuple[float, int]:
    """Seconds and peak, as a search predicts them."""
    assert stages.backward is not None
    return METER.region(stages.forward).seconds + METER.region(stages.backward).seconds, peak_bytes(stages)


def lowered(steps: int, levers: Levers, optimizer: str = "adam") -> tuple[Any, Stages]:
    program = mlc.trace(loop, *problem(steps, optimizer))
    return program, finish(joint_of(program, make_plan(program, flows="mixed")), levers)


# Levers under which the same graphs come out at every number of trips.
ALIKE = [Levers(), Levers(0.0, 2), Levers(0.0, 3), Levers(1e-9), Levers(0.0, None, 2)]


@pytest.mark.parametrize("levers", ALIKE, ids=str)
def test_a_formula_is_what_planning_there_predicts(levers: Levers) -> None:
    program, stages = lowered(12, levers)
    f = formula_of(stages, Symbols(program, batches=False))
    assert f.peak_bytes is not None
    for steps in (5, 12, 31):
        seconds, peak = cost(lowered(steps, levers)[1])
        assert float(f.seconds.subs(T, steps)) == pytest.approx(seconds, rel=0.01)
        assert float(f.peak_bytes.subs(T, steps)) == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("levers", [Levers(1e-7, 3), Levers(1e-3, 1), Levers(1e-7, 2, 4)], ids=str)
def test_a_formula_is_what_its_own_graphs_cost_at_other_counts(levers: Levers) -> None:
    program, stages = lowered(12, levers)
    f = formula_of(stages, Symbols(program, batches=False))
    trips = Trips.of(stages)
    for n in (6, 50, 333):
        forward, backward = trips.at(dict.fromkeys(trips.groups, n))
        seconds, peak = cost(replace(stages, forward=forward, backward=backward))
        assert float(f.seconds.subs(T, n)) == pytest.approx(seconds, rel=1e-9)
        assert int(f.peak_bytes.subs(T, n)) == peak


def test_now_is_the_plans_own_prediction() -> None:
    program = mlc.trace(loop, *problem(9))
    for options in ({}, {"memory": "min"}, {"backend": "inductor"}):
        plan = mlc.plan(program, **options)
        f = plan.formulas
        assert f.now[T] == 9 and f.symbols[T] == "trips of L1"
        assert float(f.seconds.subs(f.now)) == pytest.approx(plan.seconds, rel=1e-6)
        assert int(f.peak_bytes.subs(f.now)) == plan.peak_bytes


def nested(model: nn.Module, reg: Tensor, meta: Tensor, outer: int, batches: list[Any]) -> Tensor:
    top = torch.optim.SGD([reg], lr=0.1)
    x, y = batches[0]
    for _ in range(outer):
        opt = torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-3)
        with mlc.level("inner"):
            for a, b in batches:
                opt.zero_grad()
                (F.mse_loss(model(a), b) + reg.exp() * model.weight.square().sum()).backward()
                opt.step()
        top.zero_grad()
        ((model(x) - y) * meta.exp()).square().mean().backward()
        top.step()
    return F.mse_loss(model(x), y)


@pytest.mark.parametrize("flows", ["mixed", "forward"])
def test_nested_loops_have_a_symbol_each(flows: str) -> None:
    def program(outer: int, inner: int) -> Any:
        batches = [(torch.randn(5, 4), torch.randn(5, 1)) for _ in range(inner)]
        reg, meta = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(5, 1))
        return mlc.trace(nested, nn.Linear(4, 1), reg, meta, outer, batches)

    f = mlc.plan(program(4, 4), flows=flows).formulas
    a, b = (sympy.Symbol(n, integer=True, positive=True) for n in ("T1", "T2"))
    assert f.symbols == {a: "trips of L1", b: "trips of L2"} and f.now == {a: 4, b: 4}
    for outer, inner in ((4, 4), (7, 9), (20, 3)):
        there = mlc.plan(program(outer, inner), flows=flows, backend="interpreter")
        at = {a: outer, b: inner}
        assert float(f.seconds.subs(at)) == pytest.approx(there.seconds, rel=0.01)
        assert float(f.peak_bytes.subs(at)) == pytest.approx(there.peak_bytes, rel=0.01)


# ---- batches

B = sympy.Symbol("B", integer=True, positive=True)


def reweighted(net: nn.Module, weigh: nn.Module, batches: list[Any], val: Any) -> Tensor:
    opt = torch.optim.Adam(net.parameters(), lr=0.02, eps=1e-3)
    for x, y in batches:
        opt.zero_grad()
        losses = F.cross_entropy(net(x), y, reduction="none")
        (torch.sigmoid(weigh(x)).squeeze(1) * losses).mean().backward()
        opt.step()
    return F.cross_entropy(net(val[0]), val[1])


def at_batch(size: int, steps: int, middle: nn.Module) -> Any:
    net = nn.Sequential(nn.Linear(6, 40), middle, nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 3))
    batches = [(torch.randn(size, 6), torch.randint(3, (size,))) for _ in range(steps)]
    val = torch.randn(8, 6), torch.randint(3, (8,))
    return mlc.trace(reweighted, net, nn.Linear(6, 1), batches, val)


def test_the_size_of_a_batch_is_a_symbol() -> None:
    plan = mlc.plan(at_batch(32, 5, nn.Tanh()), flows="mixed", backend="interpreter")
    f = plan.formulas
    assert f.symbols == {T: "trips of L1", B: "examples of a batch"} and f.now == {T: 5, B: 32}
    assert float(f.seconds.subs(f.now)) == pytest.approx(plan.seconds)
    assert float(f.peak_bytes.subs(f.now)) == pytest.approx(plan.peak_bytes)
    for size, steps in ((16, 5), (64, 5), (24, 9), (48, 20)):
        there = mlc.plan(at_batch(size, steps, nn.Tanh()), flows="mixed", backend="interpreter")
        at = {T: steps, B: size}
        assert float(f.seconds.subs(at)) == pytest.approx(there.seconds, rel=0.01)
        assert float(f.peak_bytes.subs(at)) == pytest.approx(there.peak_bytes, rel=0.02)


def test_where_examples_meet_there_is_no_batch() -> None:
    program = at_batch(16, 3, nn.BatchNorm1d(40))
    f = mlc.plan(program, flows="mixed").formulas
    assert set(f.symbols) == {T}


def test_break_evens_along_the_batch() -> None:
    own = Formula(1.0 * B * T, sympy.Integer(0), 10 * B * T, {T: 2, B: 1})
    rival = Formula(2.0 * B * T, sympy.Integer(0), 500 + B * T, {T: 2, B: 1})
    unknown = Formula(1.5 * B * T, sympy.Integer(0), 100 + T, {T: 2})
    found = break_evens(own, {"rival": rival, "unknown": unknown}, {T: 10, B: 8}, 1000)
    assert [(b.symbol, b.at, b.winner) for b in found] == [("T", 13, "unknown"), ("B", 11, "rival")]


# ---- tangents


def rates(net: nn.Module, rate: Tensor, batches: list[Any]) -> Tensor:
    fast = mlc.clone(net)
    with torch.no_grad():
        for p in fast.parameters():
            p.requires_grad_()
    for x, y in batches:
        grads = torch.autograd.grad(F.mse_loss(fast(x), y), list(fast.parameters()))
        for p, g in zip(fast.parameters(), grads, strict=True):
            with torch.no_grad():
                p -= rate.exp().sum() * g
    return F.mse_loss(fast(batches[0][0]), batches[0][1])


def rated(k: int, steps: int = 6, wide: int = 64) -> Any:
    net = nn.Sequential(nn.Linear(6, wide), nn.Tanh(), nn.Linear(wide, 2))
    for p in net.parameters():
        p.requires_grad_(False)
    batches = [(torch.randn(64, 6), torch.randn(64, 2)) for _ in range(steps)]
    return mlc.trace(rates, net, torch.full((k,), -3.0, requires_grad=True), batches)


def test_forward_mode_costs_what_planning_with_more_elements_predicts() -> None:
    program = rated(4)
    plan = mlc.plan(program, flows="forward", backend="interpreter")
    symbols = Symbols(program)
    formula_of(stages_for(program, plan), symbols)
    at = tangent_costs(stages_for(program, plan), symbols, None, 4)
    for k in (2, 4, 7, 8, 64):
        there = mlc.plan(rated(k), flows="forward", backend="interpreter")
        assert at(k)[0] == pytest.approx(there.seconds, rel=0.01)
        assert at(k)[1] == pytest.approx(there.peak_bytes, rel=0.01)


def one_rate() -> mlc.Program:
    """Descent with one learned rate: forward mode is clearly the faster."""

    def train(model, rate, batches):
        for x, y in batches:
            grads = torch.autograd.grad((model(x) - y).square().mean(), list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= rate * g
        return (model(batches[0][0]) - batches[0][1]).square().mean()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    batches = [(torch.randn(256, 32), torch.randn(256, 1)) for _ in range(6)]
    return mlc.trace(train, model, torch.tensor(0.1, requires_grad=True), batches)


def test_forward_mode_wins_up_to_a_number_of_elements() -> None:
    program = one_rate()
    plan = mlc.plan(program, backend="interpreter")
    assert plan.mode == "forward"
    (b,) = [x for x in plan.formulas.breaks if x.symbol == "K"]
    assert b.above and b.winner == "mixed mode" and b.at > 1
    symbols = Symbols(program)
    formula_of(stages_for(program, plan), symbols)
    at = tangent_costs(stages_for(program, plan), symbols, None, 1)
    other = mlc.plan(program, flows="mixed", backend="interpreter").seconds
    assert at(b.at - 1)[0] <= other < at(b.at)[0]
    assert f"from K = {b.at} on, mixed mode is faster" in plan.explain(verbose=True)


def test_a_number_of_elements_is_bisected() -> None:
    def forward(k: int) -> tuple[float, int]:
        return 1.0 + 0.5 * k, 100 * k

    b = tangent_break(forward, 2, (10.0, 50), ("forward mode", "mixed mode"), None)
    assert b is not None and str(b) == "from K = 19 on, mixed mode is faster"
    b = tangent_break(forward, 30, (10.0, 50), ("mixed mode", "forward mode"), None)
    assert b is not None and str(b) == "up to K = 18, forward mode is faster"
    b = tangent_break(forward, 2, (10.0, 900), ("forward mode", "mixed mode"), 500)
    assert b is not None and (b.at, b.why, b.winner) == (6, "memory", "")
    assert tangent_break(forward, 30, (1.2, 50), ("mixed mode", "forward mode"), None) is None


def test_replays_count_what_the_schedule_counts() -> None:
    assert Replayed(T, 3).subs(T, 20) == replayed_steps(20, 3)
    assert Replayed(T, 3).has(T)


# ---- break-even points


def confirmed(b: BreakEven, own: Any, rivals: dict[str, Formula], budget: int | None, now: Any = None) -> None:
    """On this side the plan is the better one, on the other it is not."""

    def at(f: Any, x: int) -> tuple[float, float]:
        there = {**(now or {}), sympy.Symbol(b.symbol, integer=True, positive=True): x}
        return float(f.seconds.subs(there)), float(f.peak_bytes.subs(there))

    here = b.at - 1 if b.above else b.at + 1
    fits = [budget is None or at(own, x)[1] <= budget for x in (here, b.at)]
    assert fits[0]
    if b.why == "memory" and budget is not None:
        assert not fits[1]
        assert not b.winner or at(rivals[b.winner], b.at)[1] <= budget
    elif b.why == "memory":
        assert at(rivals[b.winner], here)[1] >= at(own, here)[1]
        assert at(rivals[b.winner], b.at)[1] < at(own, b.at)[1]
    else:
        rival = rivals[b.winner]
        assert at(rival, b.at)[0] < at(own, b.at)[0] and (budget is None or at(rival, b.at)[1] <= budget)
        assert at(rival, here)[0] * 1.002 >= at(own, here)[0] or (budget is not None and at(rival, here)[1] > budget)


def test_break_evens_of_a_budget_hold_on_both_sides() -> None:
    program = mlc.trace(loop, *problem(20))
    most = mlc.plan(program).peak_bytes
    seen = set()
    for budget in (most // 3, most // 2, 2 * most):
        plan = mlc.plan(program, memory=budget)
        f = plan.formulas
        assert f.breaks
        for b in f.breaks:
            confirmed(b, f, f.rivals, budget, f.now)
            seen.add((b.above, bool(b.winner)))
    assert (True, True) in seen and (False, True) in seen


def made(seconds: Any, peak: Any) -> Formula:
    return Formula(seconds, sympy.Integer(0), peak, {T: 2})


def test_equal_times_are_solved() -> None:
    own, other = made(1 + T, 10 * T), made(50 + 0.5 * T, 5 * T)
    (b,) = [x for x in break_evens(own, {"other": other}, {T: 20}, None) if x.why == "time"]
    assert (b.at, b.above, b.winner) == (99, True, "other")
    confirmed(b, own, {"other": other}, None)


def test_times_with_replays_are_bisected() -> None:
    own, other = made(T + Replayed(T, 2), 10 * T), made(8.0 * T, 90 * T)
    (b,) = [x for x in break_evens(own, {"other": other}, {T: 8}, None) if x.why == "time"]
    confirmed(b, own, {"other": other}, None)


def test_without_a_budget_a_smaller_plan_is_named_where_it_becomes_smaller() -> None:
    own, other = made(1 + T, sympy.Max(30 + 10 * T, 100 + T)), made(5 + 2 * T, 400 + 2 * T)
    found = break_evens(own, {"forward mode": other}, {T: 10}, None)
    (b,) = [x for x in found if x.why == "memory"]
    assert str(b) == "from T = 47 on, forward mode needs less memory"
    confirmed(b, own, {"forward mode": other}, None)


def test_a_budget_that_nothing_meets_beyond_a_point() -> None:
    (b,) = break_evens(made(T, 10 * T), {}, {T: 10}, 205)
    assert (b.at, b.winner) == (21, "") and "no plan known here does" in str(b)


# ---- where they are shown


def test_explanations_show_them() -> None:
    program = mlc.trace(loop, *problem(9))
    plan = mlc.plan(program, memory=2 * mlc.plan(program).peak_bytes)
    assert "T: trips of L1, now 9" in plan.explain()
    text = plan.explain(verbose=True)
    assert "formula: time ~ " in text and "break-even: from T = " in text and "flop" in text


def test_a_plan_from_a_file_has_formulas_with_its_program_only(tmp_path: Any) -> None:
    program = mlc.trace(loop, *problem(5))
    plan = mlc.plan(program, memory="min")
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json", program)
    assert again.formulas.peak_bytes == plan.formulas.peak_bytes and not again.formulas.rivals
    with pytest.raises(mlc.PlanError, match="no formulas"):
        _ = Plan.load(tmp_path / "plan.json").formulas
    assert json.dumps(again.formulas.as_dict())


# ---- other counts


def test_open_loops_are_planned_for_other_counts() -> None:
    def run(net: nn.Module, weights: Tensor, batches: list[Any], val: Any) -> Tensor:
        fast = mlc.clone(net)
        opt = torch.optim.SGD(fast.parameters(), lr=0.1, momentum=0.9)
        for x, y in batches:
            opt.zero_grad()
            (weights * F.cross_entropy(fast(x), y, reduction="none")).mean().backward()
            opt.step()
        return F.cross_entropy(fast(val[0]), val[1])

    def args(n: int) -> tuple[Any, ...]:
        net, _, weights, batches, _ = problem(n)
        return net, weights, batches, problem(1)[3][0]

    short, long = mlc.trace(run, *args(6)), mlc.trace(run, *args(40))
    grown = replace(short, region=planned_for(short.region, lambda g: 40))
    assert str(grown) == str(short)
    a, b = mlc.plan(grown, memory="min"), mlc.plan(long, memory="min")
    assert a.peak_bytes == pytest.approx(b.peak_bytes, rel=0.02)
    assert a.seconds == pytest.approx(b.seconds, rel=0.05)
