"""The planner: one price of memory, budgets, levers that are exact, states that are rebuilt, refused memory."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc
from mlc.ir.core import Loop
from mlc.ir.lowered.contract import Levers
from mlc.ir.lowered.slots import Slots, replayed_steps
from mlc.ir.types import SeqType, TensorType, resident
from mlc.passes.cost.memory import peak_bytes, region_peak
from mlc.passes.lowering.pipeline import PIPELINE
from mlc.passes.planning.options import sweeping
from mlc.passes.planning.planned import joint_of
from mlc.passes.planning.planner import usable
from mlc.passes.planning.search import front
from mlc.passes.remat.inlined import TAG as INNER
from mlc.runtime.call import Executor
from mlc.view.plan import Plan, make_plan, sweep
from tests import programs
from tests.passes.finishing import finish

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, eps=1e-3),
}


def loop(net: nn.Module, start: nn.Module, weights: Tensor, batches: list[Any], make: Any) -> Tensor:
    fast = mlc.clone(start)
    opt = make(fast.parameters())
    for x, y in batches:
        opt.zero_grad()
        (torch.sigmoid(weights) * F.cross_entropy(fast(x), y, reduction="none")).mean().backward()
        opt.step()
    x, y = batches[0]
    return F.cross_entropy(fast(x), y)


def problem(steps: int, optimizer: str = "adam") -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)).double()
    batches = [(torch.randn(8, 6).double(), torch.randint(3, (8,))) for _ in range(steps)]
    weights = torch.randn(8, dtype=torch.float64, requires_grad=True)
    return net, net, weights, batches, OPTIMIZERS[optimizer]


def gradients(run: Any, args: tuple[Any, ...]) -> list[Tensor]:
    metas = [args[2], *args[1].parameters()]
    return list(torch.autograd.grad(run(*args), metas))


def under(levers: Levers) -> Any:
    """A compiled function that runs under these levers, whatever the planner would choose."""
    import mlc.compiled.entry as compiled

    def run(*args: Any) -> Tensor:
        cf = mlc.compile(loop, flows="mixed")

        def chosen(program: Any, plan: Plan) -> Any:
            return finish(joint_of(program, plan), levers)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "stages_for", chosen)
            return cf(*args)

    return run


LEVERS = [
    Levers(1e-10), Levers(1e-9), Levers(1e-7), Levers(0.0, 1), Levers(0.0, 2), Levers(0.0, 3), Levers(1e-9, 2),
    Levers(1e-3, 1), Levers(1e-3, 3), Levers(0.0, None, 2), Levers(1e-7, 2, 4), Levers(1e-3, 1, 8),
]  # fmt: skip


@pytest.mark.parametrize("levers", LEVERS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_lever_is_exact(levers: Levers, optimizer: str) -> None:
    args = problem(7, optimizer)
    expected = gradients(under(Levers()), args)
    for a, b in zip(gradients(under(levers), args), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_the_reference_of_the_levers_is_right() -> None:
    """Finite differences of the values, so that the test above compares with the truth."""
    args = problem(7)
    found = gradients(under(Levers()), args)[0]
    direction = torch.randn_like(found)

    def value(step: float) -> float:
        moved = (args[0], args[1], (args[2] + step * direction).detach().requires_grad_(), *args[3:])
        return float(under(Levers())(*moved).detach())

    difference = (value(1e-5) - value(-1e-5)) / 2e-5
    assert abs(float((found * direction).sum()) - difference) < 1e-7 * abs(difference) + 1e-9


def test_a_backward_can_run_twice_over_rebuilt_states() -> None:
    args = problem(9)
    value = under(Levers(1e-9, 2))(*args)
    (a,) = torch.autograd.grad(value, [args[2]], retain_graph=True)
    (b,) = torch.autograd.grad(value, [args[2]])
    assert torch.equal(a, b)


def test_rebuilt_states_notice_a_changed_weight() -> None:
    args = problem(9)
    value = under(Levers(1e-3, 2))(*args)
    with torch.no_grad():
        args[2].add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        torch.autograd.grad(value, [args[2]])


@pytest.mark.slow
def test_levers_are_the_users_where_they_say_so() -> None:
    args = problem(7)
    program = mlc.trace(loop, *args)
    chosen = mlc.plan(program, memory="min")
    plan = mlc.plan(program, memory="min", levers={"slots": 3, "parts": 2})
    assert (plan.price, plan.slots, plan.parts) == (chosen.price, 3, 2)
    fixed = {d.subject: d.reason.startswith("asked for") for d in plan.decisions}
    assert fixed["states"] and fixed["micro-batches"]
    expected = gradients(under(Levers()), args)
    compiled = mlc.compile(loop, levers={"price": 1e-3, "slots": 2})
    for a, b in zip(gradients(compiled, args), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert compiled.plan.slots == 2 and compiled.plan.price == 1e-3


@pytest.mark.parametrize("levers", [{"slot": 2}, {"slots": 0}, {"parts": None}, {"price": "much"}, {"parts": True}, 3])
def test_levers_that_make_no_sense_are_refused(levers: Any) -> None:
    with pytest.raises(mlc.PlanError, match="levers"):
        mlc.compile(loop, levers=levers)


# ---- states


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("trips", [1, 2, 7, 33])
def test_the_schedule_reaches_every_trip_within_its_slots(slots: int, trips: int) -> None:
    plan = Slots(slots)
    held = set()
    for t in range(trips):
        keep, dropped = plan.offer(t)
        held -= set(dropped)
        held |= {t} if keep else set()
        assert held == set(plan.held) and len(held) <= slots and 0 in held
    count = 0
    for t in range(trips - 1, -1, -1):
        held -= set(plan.drop_after(t))
        at = max(x for x in held if x <= t)
        for step, keep in plan.way(t):
            assert step == at
            at += 1
            count += 1
            held |= {at} if keep else set()
        assert at == t and len(held) <= slots
    assert count == replayed_steps(trips, slots)


def growth(levers: Levers, optimizer: str) -> float:
    """Bytes that a step adds to the predicted peak, in times of the parameters' bytes."""
    size = sum(resident(TensorType.of(p)) for p in problem(1)[1].parameters())
    peaks = {}
    for steps in (20, 40):
        program = mlc.trace(loop, *problem(steps, optimizer))
        joint = joint_of(program, make_plan(program, flows="mixed"))
        peaks[steps] = peak_bytes(finish(joint, levers))
    return (peaks[40] - peaks[20]) / (20 * size)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_middle_price_keeps_at_most_the_gradient_of_a_step(optimizer: str) -> None:
    """With few sets of states a step adds at most its gradient, P bytes, and its batch (0.13 P here)."""
    assert growth(Levers(1e-7, 3), optimizer) <= 1.15


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_high_price_keeps_nothing_of_a_step(optimizer: str) -> None:
    """The adjoint makes the gradient of a step again, and a replay redoes whole steps: only its batch stays."""
    assert growth(Levers(1e-3, 3), optimizer) <= 0.15


@pytest.mark.slow
def test_what_a_step_gives_up_is_made_again_only_where_it_is_needed() -> None:
    """Of the values of sixteen layers, replays of whole steps hold those of a few at any time."""
    net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(16)], nn.Linear(8, 3))
    batches = [(torch.randn(512, 8), torch.randint(3, (512,))) for _ in range(6)]
    program = mlc.trace(loop, net, net, torch.randn(512, requires_grad=True), batches, OPTIMIZERS["adam"])
    joint = joint_of(program, make_plan(program, flows="mixed"))

    def steps(price: float) -> Loop:
        forward = finish(joint, Levers(price, 2)).forward
        return next(e.op for e in forward.eqns if isinstance(e.op, Loop) and e.op.replay)

    replay = steps(1e-3).replay
    assert replay is not None and any(e.op == torch.ops.aten.mm.default for e in replay.body.walk())
    # 0.24; 0.40 when what was cut is made again right behind the cut
    assert region_peak(replay.body) < 0.3 * region_peak(steps(0.0).body)


def test_an_adjoint_computes_for_itself_what_is_too_dear_to_keep() -> None:
    program = mlc.trace(loop, *problem(12))
    joint = joint_of(program, make_plan(program, flows="mixed"))

    def inner(levers: Levers) -> int:
        backward = finish(joint, levers).backward
        assert backward is not None
        return sum(e.tag == INNER for e in backward.walk())

    assert inner(Levers(0.0)) == 0
    assert inner(Levers(1e-3, 3)) > 20


# ---- budgets


@pytest.mark.parametrize(("device", "taken"), [("cpu", [576, 580, 1088, 1089]), ("cuda", [0, 512, 512, 1024])])
def test_a_tensor_takes_more_than_its_elements(device: str, taken: list[int]) -> None:
    types = [TensorType(torch.uint8, (n,), (1,), torch.device(device)) for n in (0, 4, 512, 513)]
    assert [resident(t) for t in types] == taken
    assert [resident(SeqType(t, 3)) for t in types] == [3 * size for size in taken]


@pytest.mark.slow
def test_a_budget_leaves_room_for_libraries_unless_nothing_would_fit() -> None:
    assert (usable(1600), usable(2**30)) == (1500, 2**30 - 2**20)
    program = mlc.trace(loop, *problem(12))
    most = mlc.plan(program).peak_bytes
    assert mlc.plan(program, memory=most).peak_bytes <= usable(most) < most
    with pytest.raises(mlc.BudgetError) as e:
        mlc.plan(program, memory=1)
    assert usable(e.value.least) < mlc.plan(program, memory=e.value.least).peak_bytes <= e.value.least


@pytest.mark.slow
def test_budgets_hold_and_time_falls_as_they_grow() -> None:
    program = mlc.trace(loop, *problem(12))
    least = mlc.plan(program, memory="min")
    most = mlc.plan(program, flows="mixed")
    assert least.peak_bytes < most.peak_bytes
    found = [mlc.plan(program, memory=b) for b in range(least.peak_bytes, 2 * most.peak_bytes, most.peak_bytes // 5)]
    for plan in found:
        assert plan.memory is not None and plan.peak_bytes <= plan.memory
    assert all(a.seconds >= b.seconds for a, b in itertools.pairwise(found))


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    program = mlc.trace(loop, *problem(5))
    with pytest.raises(mlc.BudgetError, match="smallest predicted peak") as e:
        mlc.plan(program, memory=100)
    least = int(str(e.value.advice).split("memory=")[1].split(",")[0])
    assert least == e.value.least <= mlc.plan(program, memory="min").peak_bytes
    assert mlc.plan(program, memory=least).peak_bytes <= least


def test_a_sweep_is_a_front() -> None:
    plans = sweep(mlc.trace(loop, *problem(12)))
    assert len(plans) > 2
    assert all(a.seconds <= b.seconds and a.peak_bytes > b.peak_bytes for a, b in itertools.pairwise(plans))


def test_a_sweep_is_under_the_options_of_the_function() -> None:
    """What its plans compute must be what the function would compute: dtypes and passes too, but for the budget."""
    given = {"memory": 1, "levers": {"parts": 2}, "mesh": None, "verify": None, "precision": "bf16", "passes": PIPELINE}
    plans = sweep(programs.two_levels(), **sweeping({**given, "flows": "mixed"}))
    assert plans and all(p.precision is not None and p.precision.compute for p in plans)


def test_a_front_has_nothing_that_another_beats() -> None:
    class Point:
        def __init__(self, seconds: float, peak: int) -> None:
            self.seconds, self.peak = seconds, peak

    a, b, c = Point(1, 9), Point(2, 9), Point(3, 1)
    assert front([c, b, a]) == [a, c]  # type: ignore[list-item]


def test_a_plan_file_gives_the_same_stages(tmp_path: Any) -> None:
    args = problem(6)
    program = mlc.trace(loop, *args)
    plan = mlc.plan(program, memory="min")
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json", program)
    from mlc.view.plan import stages_for

    one, two = stages_for(program, plan), stages_for(program, again)
    assert len(one.forward.eqns) == len(two.forward.eqns) and peak_bytes(one) == peak_bytes(two)
    loops = [e.op for e in two.forward.eqns if isinstance(e.op, Loop)]
    assert plan.slots is None or any(op.replay is not None for op in loops)


# ---- memory refused


def test_refused_memory_plans_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(6)
    expected = gradients(mlc.compile(loop), args)
    cf = mlc.compile(loop)
    whole = Executor.forward
    calls = []

    def refuses(self: Executor, *given: Any) -> Any:
        calls.append(self)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no")
        return whole(self, *given)

    monkeypatch.setattr(Executor, "forward", refuses)
    with pytest.warns(mlc.MemoryWarning, match="planned again"):
        found = gradients(cf, args)
    assert len(calls) == 2 and calls[0] is not calls[1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_memory_refused_again_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Executor, *given: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Executor, "forward", refuses)
    with pytest.warns(mlc.MemoryWarning), pytest.raises(torch.OutOfMemoryError):
        mlc.compile(loop)(*problem(3))
