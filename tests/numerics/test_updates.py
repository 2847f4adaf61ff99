"""Which parameters a step trains and with what state: groups, several optimizers, averages, warm starts."""

import copy
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.numerics.models import Meta, draw, mlp, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner, schedule

SUITE = Suite()
EPS = 1e-3


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


@SUITE.add()
def parameter_groups() -> Setup:
    def loop(model, meta, batches, val):
        opt = SGD(
            [
                {"params": model[0].parameters(), "lr": 0.3, "weight_decay": 0.1},
                {"params": [model[2].weight]},
                {"params": [model[2].bias], "momentum": 0.0},
            ],
            lr=0.05,
            momentum=0.9,
        )
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        settings = {
            "0.weight": {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1},
            "0.bias": {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1},
            "2.weight": {"lr": 0.05, "momentum": 0.9},
            "2.bias": {"lr": 0.05},
        }
        for x, y in batches:
            for n, g in learner.grads(train_loss(learner, meta, x, y)).items():
                learner.step(SGD, {n: g}, **settings[n])
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add(warns="as in PyTorch")
def two_optimizers_take_turns() -> Setup:
    """A generator and a critic, as in adversarial training: each step sees the other's last parameters."""

    def losses(maker, critic, meta, noise, real):
        fake = maker(noise)
        l2 = meta.log_l2.exp()
        return F.softplus(critic(fake)).mean() + F.softplus(-critic(real)).mean() + l2 * fake.square().mean()

    def loop(maker, critic, meta, batches):
        opt_m, opt_c = (
            Adam(maker.parameters(), lr=0.05, eps=EPS),
            SGD(critic.parameters(), lr=0.1, momentum=0.5),
        )
        for noise, real in batches:
            opt_c.zero_grad()
            losses(maker, critic, meta, noise, real).backward()
            opt_c.step()
            opt_m.zero_grad()
            (-losses(maker, critic, meta, noise, real)).backward()
            opt_m.step()
        return losses(maker, critic, meta, *batches[0])

    def reference(maker, critic, meta, batches):
        m, c = Learner(maker), Learner(critic)
        for noise, real in batches:
            c.renew()
            c.step(SGD, c.grads(losses(m, c, meta, noise, real)), lr=0.1, momentum=0.5)
            m.renew()
            m.step(Adam, m.grads(-losses(m, c, meta, noise, real)), lr=0.05, eps=EPS)
        return losses(m, c, meta, *batches[0])

    meta = Meta()
    args = {
        "maker": nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)),
        "critic": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        "meta": meta,
        "batches": [(torch.randn(5, 2), torch.randn(5, 3)) for _ in range(3)],
    }
    return Setup(loop, reference, args, {"log_l2": meta.log_l2})


def averaged_reference(decay):
    def reference(model, meta, batches, val, ema=None):
        learner = Learner(model)
        mean = dict(learner.params)
        for t, (x, y) in enumerate(batches):
            learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.2)
            d = decay(t)
            mean = {n: d * mean[n] + (1 - d) * p for n, p in learner.params.items()}
        return val_loss(Learner(model, mean), val)

    return reference


@SUITE.add()
def ema_by_hand() -> Setup:
    def loop(model, meta, batches, val, ema):
        opt = SGD(model.parameters(), lr=0.2)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
            with torch.no_grad():
                for mean, p in zip(ema.parameters(), model.parameters(), strict=True):
                    mean.mul_(0.7).add_(p, alpha=0.3)
        return val_loss(ema, val)

    given = task()
    args = {**given.args(), "ema": copy.deepcopy(given.model)}
    return Setup(loop, averaged_reference(lambda t: 0.7), args)


@SUITE.add()
def ema_by_data() -> Setup:
    def loop(model, meta, batches, val, ema):
        opt = SGD(model.parameters(), lr=0.2)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
            for mean, p in zip(ema.parameters(), model.parameters(), strict=True):
                mean.data.lerp_(p.data, 0.3)
        return val_loss(ema, val)

    given = task()
    args = {**given.args(), "ema": copy.deepcopy(given.model)}
    return Setup(loop, averaged_reference(lambda t: 0.7), args)


@SUITE.add()
def averaged_model_of_torch() -> Setup:
    def loop(model, meta, batches, val, ema):
        opt = SGD(model.parameters(), lr=0.2)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
            ema.update_parameters(model)
        return val_loss(ema, val)

    given = task()
    ema = AveragedModel(given.model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    # The first update copies.
    return Setup(loop, averaged_reference(lambda t: 0.7 if t else 0.0), {**given.args(), "ema": ema})


@SUITE.add()
def optimizer_with_state_from_before() -> Setup:
    def loop(model, meta, batches, val, opt):
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val, opt):
        learner = Learner(model)
        learner.continue_from(opt)
        for x, y in batches:
            learner.step(Adam, learner.grads(train_loss(learner, meta, x, y)), lr=0.05, eps=EPS, amsgrad=True)
        return val_loss(learner, val)

    given = task()
    opt = Adam(given.model.parameters(), lr=0.05, eps=EPS, amsgrad=True)
    for x, y in (draw("mlp"), draw("mlp")):
        opt.zero_grad()
        F.cross_entropy(given.model(x), y).backward()
        opt.step()
    return Setup(loop, reference, {**given.args(), "opt": opt})


@SUITE.add()
def schedule_from_before() -> Setup:
    """An optimizer and a scheduler that stand in the middle of their run."""

    def loop(model, meta, batches, val, opt, turn):
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
            turn.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val, opt, turn):
        learner = Learner(model)
        learner.continue_from(opt)
        table = schedule(SGD, {"lr": 0.2, "momentum": 0.9}, lambda o: schedulers.StepLR(o, 2, 0.5), 6)[3:]
        for (x, y), now in zip(batches, table, strict=True):
            learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), **now)
        return val_loss(learner, val)

    given = task()
    opt = SGD(given.model.parameters(), lr=0.2, momentum=0.9)
    turn = schedulers.StepLR(opt, 2, 0.5)
    for x, y in (draw("mlp"), draw("mlp"), draw("mlp")):
        opt.zero_grad()
        F.cross_entropy(given.model(x), y).backward()
        opt.step()
        turn.step()
    return Setup(loop, reference, {**given.args(), "opt": opt, "turn": turn})


@SUITE.add()
def model_and_optimizer_made_inside() -> Setup:
    def loop(meta, batches, val):
        torch.manual_seed(7)
        model = mlp()
        opt = Adam(model.parameters(), lr=0.05, eps=EPS)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(meta, batches, val):
        torch.manual_seed(7)
        learner = Learner(mlp())
        for x, y in batches:
            learner.step(Adam, learner.grads(train_loss(learner, meta, x, y)), lr=0.05, eps=EPS)
        return val_loss(learner, val)

    args = task().args()
    del args["model"]
    return Setup(loop, reference, args)
