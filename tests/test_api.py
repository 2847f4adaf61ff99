"""mlc.trace and mlc.plan: a program and a plan without a run."""

import re

import pytest
import torch
from torch import nn

import mlc
from tests.check.test_check import task, train


def test_trace_runs_nothing_and_changes_nothing() -> None:
    model, weights, batches, val = task()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    program = mlc.trace(train, model, weights, batches, val)
    assert [program.inputs[i].name for i in program.metas] == ["weights.slope", "weights.offset"]
    assert program.n_outputs == 1
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert str(program)


def test_trace_takes_compiled_functions_and_methods() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model, self.weights, self.batches, self.val = task()

        @mlc.compile
        def loss(self, scale: float) -> torch.Tensor:
            return scale * train(self.model, self.weights, self.batches, self.val)

    trainer = Trainer()
    program = mlc.trace(trainer.loss, scale=2.0)
    assert len(program.metas) == 2
    assert mlc.check(trainer.loss, 2.0).ok


def test_plan_belongs_to_its_program() -> None:
    args = task()
    program = mlc.trace(train, *args)
    plan = mlc.plan(program)
    assert plan.program == mlc.plan(mlc.trace(train, *args)).program
    other = mlc.plan(mlc.trace(train, *task(2)[:1], *args[1:3], (torch.randn(5, 4), torch.zeros(5).long())))
    assert plan.program != other.program


def test_options_that_make_no_sense() -> None:
    program = mlc.trace(train, *task())
    for options in ({"memory": "much"}, {"backend": "magic"}, {"stop_gradient": "some"}):
        with pytest.raises(mlc.PlanError) as caught:
            mlc.plan(program, **options)
        assert caught.value.advice


@pytest.mark.parametrize("option", ["flows", "precision", "mesh"])
def test_modes_precision_and_meshes_that_make_no_sense(option: str) -> None:
    with pytest.raises(mlc.PlanError, match=option) as caught:
        mlc.compile(train, **{option: "any"})
    assert caught.value.advice
    with pytest.raises(mlc.PlanError, match=option):
        mlc.plan(mlc.trace(train, *task()), **{option: "any"})


@pytest.mark.slow
def test_a_budget_that_nothing_fits() -> None:
    """The message names the least that would do, and the loop; nothing has run."""
    model, *rest = task()
    before = [p.detach().clone() for p in model.parameters()]
    program = mlc.trace(train, model, *rest)
    with pytest.raises(mlc.BudgetError) as caught:
        mlc.plan(program, memory=1)
    assert caught.value.loc is not None and caught.value.loc.function == "train"
    least = int(re.search(r"memory=(\d+)", caught.value.advice).group(1))
    assert mlc.plan(program, memory=least).peak_bytes <= least
    with pytest.raises(mlc.BudgetError):
        mlc.plan(program, memory=least - 1)
    with pytest.raises(mlc.BudgetError):
        mlc.compile(train, memory=1)(model, *rest)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_placeholder_after_the_call() -> None:
    """What was logged while tracing without running says what it is, and is never taken for a number."""
    logged = []

    def loop(model: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        loss = (weight * model(torch.ones(1, 2))).sum()
        logged.append(loss.item())
        return loss

    mlc.trace(loop, nn.Linear(2, 1), torch.ones((), requires_grad=True), fake=True)
    (x,) = logged
    assert "placeholder" in str(x) and "return it" in f"{x:.3f}"
    for use in (float, int, bool, "%.3f".__mod__, lambda v: v + 1, lambda v: v < 1, lambda v: torch.ones(2) * v):
        with pytest.raises(mlc.CaptureError, match="placeholder") as caught:
            use(x)
        assert "return the value" in caught.value.advice
    assert x in logged and x != 1.0


def test_a_number_that_was_logged_is_a_number() -> None:
    logged = []

    def loop(model: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        loss = (weight * model(torch.ones(1, 2))).sum()
        logged.append(loss.item())
        return loss

    model, weight = nn.Linear(2, 1), torch.ones((), requires_grad=True)
    cf = mlc.compile(loop)
    values = [cf(model, weight).item(), cf(model, weight * 2).item()]
    assert logged == values and all(type(x) is float for x in logged)


def test_no_meta_parameter() -> None:
    def loop(model: nn.Module) -> torch.Tensor:
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(1, 2)).sum().backward()
        opt.step()
        return model(torch.ones(1, 2)).sum()

    with pytest.raises(mlc.CaptureError, match="no meta-parameter") as caught:
        mlc.trace(loop, nn.Linear(2, 1))
    assert caught.value.loc is not None
    assert caught.value.loc.file == __file__


def test_the_report_measures_every_call() -> None:
    """Memory is measured once: the first call and its gradient; later calls hold as much."""
    cf = mlc.compile(train, backend="interpreter", flows="mixed")
    args = task()
    cf(*args).backward()
    first = cf.report
    assert first is not None and first.seconds > 0 and set(first.stages) == {"forward", "backward"}
    assert first.peak_bytes > 0
    cf(*args).backward()
    assert cf.report is not None and cf.report.peak_bytes == first.peak_bytes
