"""Learning-rate schedulers: what they set before each step, and where they stand after the call."""

from types import ModuleType

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as schedulers

from tests.numerics.models import task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner, schedule

SUITE = Suite()
EPS = 1e-3


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


def scheduled(cls, given, scheduler, steps=4) -> Setup:
    def loop(model, meta, batches, val):
        opt = cls(model.parameters(), **given)
        turn = scheduler(opt)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
            turn.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for (x, y), now in zip(batches, schedule(cls, given, scheduler, steps), strict=True):
            learner.step(cls, learner.grads(train_loss(learner, meta, x, y)), **{**given, **now})
        return val_loss(learner, val)

    return Setup(loop, reference, task("mlp", steps).args())


@SUITE.add()
def step_lr() -> Setup:
    return scheduled(SGD, {"lr": 0.2, "momentum": 0.9}, lambda o: schedulers.StepLR(o, 2, gamma=0.3))


@SUITE.add()
def cosine() -> Setup:
    return scheduled(AdamW, {"lr": 0.05, "eps": EPS}, lambda o: schedulers.CosineAnnealingLR(o, T_max=4, eta_min=1e-3))


@SUITE.add()
def one_cycle_turns_momentum() -> Setup:
    return scheduled(SGD, {"lr": 0.1, "momentum": 0.9}, lambda o: schedulers.OneCycleLR(o, max_lr=0.3, total_steps=6))


@SUITE.add()
def one_cycle_turns_betas() -> Setup:
    return scheduled(Adam, {"lr": 0.01, "eps": EPS}, lambda o: schedulers.OneCycleLR(o, max_lr=0.05, total_steps=6))


@SUITE.add()
def lambda_lr() -> Setup:
    return scheduled(SGD, {"lr": 0.2}, lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)))


@SUITE.add()
def sequential_schedule() -> Setup:
    def warm_then_cosine(o):
        warm = schedulers.LinearLR(o, 0.1, total_iters=2)
        return schedulers.SequentialLR(o, [warm, schedulers.CosineAnnealingLR(o, 4)], milestones=[2])

    return scheduled(SGD, {"lr": 0.2, "momentum": 0.9}, warm_then_cosine)


@pytest.mark.parametrize("name", ["step_lr", "one_cycle_turns_betas"])
def test_a_scheduler_leaves_the_optimizer_as_the_loop_would(name: str, mlc: ModuleType) -> None:
    settings = {
        "step_lr": (SGD, {"lr": 0.2}, lambda o: schedulers.StepLR(o, 2, gamma=0.3)),
        "one_cycle_turns_betas": (
            Adam,
            {"lr": 0.01},
            lambda o: schedulers.OneCycleLR(o, 0.05, total_steps=9),
        ),
    }
    cls, given, scheduler = settings[name]

    def loop(model, meta, batches, val, opt, turn):
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
            turn.step()
        return val_loss(model, val)

    left = []
    for run in (loop, mlc.compile(loop)):
        torch.manual_seed(3)
        args = task().args()
        opt = cls(args["model"].parameters(), **given)
        turn = scheduler(opt)
        run(**args, opt=opt, turn=turn)
        left.append([opt.param_groups[0]["lr"], opt.param_groups[0].get("betas"), turn.last_epoch])
    assert left[0] == left[1]
