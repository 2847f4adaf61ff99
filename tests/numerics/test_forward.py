"""Forward mode through the loop: the programs of the other modules again, and hyperparameters of every kind."""

from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import mlc as front
from tests.numerics import (
    test_buffers,
    test_custom,
    test_data,
    test_fast_weights,
    test_gradients,
    test_hyperparameters,
    test_levels,
    test_manual,
    test_modules,
    test_outputs,
    test_schedulers,
    test_stops,
    test_updates,
)
from tests.numerics.models import MODELS, Meta, task, val_loss
from tests.numerics.optimizers import OPTIMIZERS
from tests.numerics.program import Program, Setup, check_compiled, check_reference, gradients, total
from tests.numerics.reference import Learner, clip_norm, worst
from tests.numerics.test_optimizers import program as trained

MODULES = (
    test_buffers, test_data, test_fast_weights, test_gradients, test_hyperparameters, test_levels, test_manual,
    test_modules, test_outputs, test_schedulers, test_stops, test_updates,
)  # fmt: skip
MANY = 100  # more elements than anybody would push forward


def small(program: Program) -> bool:
    return sum(t.numel() for t in program.fresh().meta.values()) <= MANY


BACKWARD_ONLY = "three_levels_where_the_middle_goes_in_reverse"  # its custom function has no forward rule
AGAIN = [p for module in MODULES for p in module.SUITE if small(p) and p.name != BACKWARD_ONLY]


@pytest.mark.parametrize("again", AGAIN, ids=lambda p: p.name)
def test_programs_of_other_modules(again: Program, mlc: ModuleType) -> None:
    check_compiled(again, mlc, "forward")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str, mlc: ModuleType) -> None:
    check_compiled(trained(optimizer, "mlp", 3), mlc, "forward")


# --- learning rate, decay, momentum, initial scale and loss weight, on four models


def five(kind: str, trips: int) -> Setup:
    def loop(model, batches, val, hyper):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(hyper["scale"])
        opt = SGD(model.parameters(), lr=hyper["lr"], momentum=0.0)
        memory = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in batches:
            opt.zero_grad()
            (hyper["weight"] * F.cross_entropy(model(x), y)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            with torch.no_grad():
                for p, m in zip(model.parameters(), memory, strict=True):
                    m.mul_(hyper["momentum"]).add_(p.grad)
                    p.grad = m + hyper["decay"] * p
            opt.step()
        return val_loss(model, val)

    def reference(model, batches, val, hyper):
        learner = Learner(model)
        learner.params = {n: p * hyper["scale"] for n, p in learner.params.items()}
        memory = {n: torch.zeros_like(p) for n, p in learner.params.items()}
        for x, y in batches:
            grads = clip_norm(learner.grads(hyper["weight"] * F.cross_entropy(learner(x), y)), 0.5)
            for n, g in grads.items():
                memory[n] = hyper["momentum"] * memory[n] + g
                learner.params[n] = learner.params[n] - hyper["lr"] * (memory[n] + hyper["decay"] * learner.params[n])
        return val_loss(learner, val)

    values = {"lr": 0.1, "decay": 0.05, "momentum": 0.8, "scale": 0.9, "weight": 1.3}
    hyper = {n: torch.tensor(v, requires_grad=True) for n, v in values.items()}
    made = task(kind, trips)
    args = {"model": made.model, "batches": made.batches, "val": made.val, "hyper": hyper}
    return Setup(loop, reference, args, hyper)


CASES = [(kind, trips) for kind in MODELS for trips in (1, 2, 3)] + [("mlp", 10), ("lstm", 10)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_five_hyperparameters(case: tuple[str, int], mlc: ModuleType) -> None:
    program = Program(partial(five, *case))
    check_reference(program)
    check_compiled(program, mlc, "forward")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("trips", range(1, 11))
def test_five_hyperparameters_for_every_length(kind: str, trips: int, mlc: ModuleType) -> None:
    check_compiled(Program(partial(five, kind, trips)), mlc, "forward")


# --- one tangent, several outputs, what has no path, data of unknown length


def one(optimizer: type[torch.optim.Optimizer]) -> Setup:
    def run(model, step, batches, val, rate):
        for x, y in batches:
            step(F.cross_entropy(model(x), y))
        return {"val": val_loss(model, val), "scores": model(val[0]), "rate": rate.square(), "none": val[0].sum()}

    def loop(model, batches, val, rate):
        opt = optimizer(model.parameters(), lr=rate, eps=1e-3)

        def step(loss: Tensor) -> None:
            opt.zero_grad()
            loss.backward()
            opt.step()

        return run(model, step, batches, val, rate)

    def reference(model, batches, val, rate):
        learner = Learner(model)

        def step(loss: Tensor) -> None:
            learner.step(optimizer, learner.grads(loss), lr=rate, eps=1e-3)

        return run(learner, step, batches, val, rate)

    made = task("mlp", 4)
    rate = torch.tensor(0.05, requires_grad=True)
    args = {"model": made.model, "batches": made.batches, "val": made.val, "rate": rate}
    return Setup(loop, reference, args, {"rate": rate})


@pytest.mark.parametrize("optimizer", [Adam, AdamW])
def test_one_hyperparameter_and_several_outputs(optimizer: type[torch.optim.Optimizer], mlc: ModuleType) -> None:
    check_compiled(Program(partial(one, optimizer)), mlc, "forward")


def test_a_meta_parameter_without_a_path_has_no_gradient() -> None:
    def loop(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            x = torch.sin(a * x)
        return x.sum(), (b > 2.5).sum()

    a, b = torch.tensor(0.7, requires_grad=True), torch.tensor([2.0, 3.0], requires_grad=True)
    x = torch.tensor([0.3, 0.4])
    compiled = front.compile(loop, flows="forward")
    out, cut = compiled(x, a, b)
    assert compiled.plan is not None and compiled.plan.mode == "forward"
    assert not cut.requires_grad
    assert int(cut) == 1
    found = torch.autograd.grad(out, [a, b], allow_unused=True)
    (expected,) = torch.autograd.grad(loop(x, a, b)[0], [a])
    assert found[1] is None
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=0)


def test_a_generator_of_another_length() -> None:
    """A loop whose length is known at run time; dropout is drawn as the plain loop would."""

    def loop(model, batches, val, meta):
        opt = Adam(model.parameters(), lr=0.05, eps=1e-3)
        for x, y in batches:
            opt.zero_grad()
            (meta(F.cross_entropy(F.dropout(model(x), 0.3), y, reduction="none"), y)).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, batches, val, meta):
        learner = Learner(model)
        for x, y in batches:
            loss = meta(F.cross_entropy(F.dropout(learner(x), 0.3), y, reduction="none"), y)
            learner.step(Adam, learner.grads(loss), lr=0.05, eps=1e-3)
        return val_loss(learner, val)

    compiled = front.compile(loop, flows="forward")
    for steps in (3, 5):
        torch.manual_seed(0)
        made, meta = task("mlp", steps), Meta()
        metas = [meta.source]
        torch.manual_seed(1)
        expected = torch.autograd.grad(reference(made.model, made.batches, made.val, meta), metas)
        torch.manual_seed(1)
        found = torch.autograd.grad(compiled(made.model, iter(made.batches), made.val, meta), metas)
        assert compiled.plan is not None and compiled.plan.mode == "forward"
        torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-14)


def test_stops_that_hold_for_the_inner_gradient_only(mlc: ModuleType) -> None:
    setup, other = test_stops.INNER.fresh(), test_stops.INNER.fresh()
    compiled = mlc.compile(setup.loop, stop_gradient="inner", flows="forward")
    found = gradients(compiled(**setup.args), setup.meta)
    assert compiled.plan.mode == "forward"
    error, name = worst(found, gradients(other.reference(**other.args), other.meta))
    assert error <= 1e-9, name


@pytest.mark.parametrize("flows", [{"L1": "reverse"}, "reverse"], ids=str)
@pytest.mark.parametrize("again", test_levels.SUITE, ids=lambda p: p.name)
def test_a_level_in_reverse(again: Program, flows: object, mlc: ModuleType) -> None:
    setup = again.fresh()
    if flows != "reverse" and len(mlc.trace(setup.loop, **setup.args).levels) == 1:
        pytest.skip("no inner gradient")
    compiled = mlc.compile(setup.loop, flows=flows)
    found = gradients(total(compiled(**setup.args)), setup.meta)
    other = again.fresh()
    error, name = worst(found, gradients(total(other.reference(**other.args)), other.meta))
    assert error <= again.tolerance, name


# --- what cannot go forward


@pytest.mark.parametrize("again", [p for p in test_custom.SUITE if "detach" not in p.name], ids=lambda p: p.name)
def test_a_custom_function_falls_back(again: Program, mlc: ModuleType) -> None:
    setup = again.fresh()
    compiled = mlc.compile(setup.loop, flows="forward")
    compiled(**setup.args)
    (mode,) = [d for d in compiled.plan.decisions if d.subject == "mode"]
    assert mode.choice == compiled.plan.mode == "mixed"
    assert "custom autograd.Function" in mode.reason
    check_compiled(again, mlc)
