"""Hyperparameters that are themselves learned: tensor learning rates, betas, decay, one rate per step."""

from types import ModuleType

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from tests.numerics.models import Meta, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner

SUITE = Suite()
EPS = 1e-3


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


def learned(cls, settings, **values) -> Setup:
    """`settings(hyper)` are the keyword arguments of the optimizer, from tensors that require grad."""

    def loop(model, meta, batches, val, hyper):
        opt = cls(model.parameters(), **settings(hyper))
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val, hyper):
        learner = Learner(model)
        for x, y in batches:
            learner.step(cls, learner.grads(train_loss(learner, meta, x, y)), **settings(hyper))
        return val_loss(learner, val)

    args = task().args()
    hyper = {n: torch.tensor(v, requires_grad=True) for n, v in values.items()}
    return Setup(loop, reference, {**args, "hyper": hyper}, {**dict(args["meta"].named_parameters()), **hyper})


@SUITE.add()
def sgd_rate() -> Setup:
    return learned(SGD, lambda h: {"lr": h["lr"], "momentum": 0.9}, lr=0.1)


@SUITE.add()
def sgd_rate_that_is_computed() -> Setup:
    """The optimizer gets a rate that is not a leaf."""
    return learned(SGD, lambda h: {"lr": h["log_lr"].exp(), "momentum": 0.9, "nesterov": True}, log_lr=-2.0)


@SUITE.add()
def sgd_decay_and_rate() -> Setup:
    return learned(SGD, lambda h: {"lr": h["lr"], "weight_decay": h["wd"]}, lr=0.1, wd=0.05)


@SUITE.add()
def adam_rate() -> Setup:
    return learned(Adam, lambda h: {"lr": h["lr"], "eps": EPS}, lr=0.05)


@SUITE.add()
def adam_rate_and_betas() -> Setup:
    return learned(Adam, lambda h: {"lr": h["lr"], "betas": (h["b1"], h["b2"]), "eps": EPS}, lr=0.05, b1=0.8, b2=0.9)


@SUITE.add()
def adamw_rate_and_betas() -> Setup:
    return learned(
        AdamW,
        lambda h: {"lr": h["lr"], "betas": (h["b1"], h["b2"]), "eps": EPS, "weight_decay": 0.1},
        lr=0.05,
        b1=0.8,
        b2=0.9,
    )


@SUITE.add()
def a_rate_for_each_group() -> Setup:
    def loop(model, batches, val, meta, weigh):
        groups = [{"params": [p], "lr": rate} for p, rate in zip(model.parameters(), meta, strict=True)]
        opt = SGD(groups, lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, weigh, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, batches, val, meta, weigh):
        learner = Learner(model)
        for x, y in batches:
            grads = learner.grads(train_loss(learner, weigh, x, y))
            for (n, g), rate in zip(grads.items(), meta, strict=True):
                learner.step(SGD, {n: g}, lr=rate)
        return val_loss(learner, val)

    args = {**task().args(), "weigh": Meta().requires_grad_(False)}
    args["meta"] = [torch.tensor(0.1 * (i + 1), requires_grad=True) for i in range(4)]
    return Setup(loop, reference, args, {str(i): r for i, r in enumerate(args["meta"])})


def per_step(write) -> Setup:
    """One learned rate for each step; `write(model, opt, rate)` is how the loop applies it."""

    def loop(model, batches, val, meta, rates):
        opt = SGD(model.parameters(), lr=0.1)
        for t, (x, y) in enumerate(batches):
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            write(model, opt, rates[t])
        return val_loss(model, val)

    def reference(model, batches, val, meta, rates):
        learner = Learner(model)
        for t, (x, y) in enumerate(batches):
            learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=rates[t])
        return val_loss(learner, val)

    args = {**task("mlp", 4).args(), "rates": nn.Parameter(torch.tensor([0.2, 0.1, 0.05, 0.15]))}
    return Setup(loop, reference, args, {**dict(args["meta"].named_parameters()), "rates": args["rates"]})


@SUITE.add()
def a_rate_for_each_step_by_hand() -> Setup:
    def write(model, opt, rate):
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad

    return per_step(write)


@SUITE.add()
def a_rate_for_each_step_in_the_group() -> Setup:
    def write(model, opt, rate):
        for group in opt.param_groups:
            group["lr"] = rate
        opt.step()

    return per_step(write)


@SUITE.add()
def a_rate_for_each_parameter_and_element() -> Setup:
    """Learned rates of the parameters' own shapes, as in Meta-SGD."""

    def loop(model, batches, val, meta, weigh):
        for x, y in batches:
            model.zero_grad()
            train_loss(model, weigh, x, y).backward()
            with torch.no_grad():
                for p, rate in zip(model.parameters(), meta.parameters(), strict=True):
                    p.sub_(rate * p.grad)
        return val_loss(model, val)

    def reference(model, batches, val, meta, weigh):
        learner = Learner(model)
        for x, y in batches:
            grads = learner.grads(train_loss(learner, weigh, x, y))
            for (n, g), rate in zip(grads.items(), meta.parameters(), strict=True):
                learner.params[n] = learner.params[n] - rate * g
        return val_loss(learner, val)

    args = {**task().args(), "weigh": Meta().requires_grad_(False)}
    args["meta"] = nn.ParameterList([torch.rand_like(p) * 0.2 for p in args["model"].parameters()])
    return Setup(loop, reference, args)


@SUITE.add()
def an_optimizer_that_is_a_network() -> Setup:
    """A learned optimizer: the update is a small network of the gradient and a momentum."""

    def update(net, g, m):
        return 0.1 * net(torch.stack([g, m], -1)).squeeze(-1)

    def loop(model, batches, val, meta, weigh):
        memory = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in batches:
            model.zero_grad()
            train_loss(model, weigh, x, y).backward()
            with torch.no_grad():
                for p, m in zip(model.parameters(), memory, strict=True):
                    m.mul_(0.9).add_(p.grad)
                    p.sub_(update(meta, p.grad, m))
        return val_loss(model, val)

    def reference(model, batches, val, meta, weigh):
        learner = Learner(model)
        memory = {n: torch.zeros_like(p) for n, p in learner.params.items()}
        for x, y in batches:
            for n, g in learner.grads(train_loss(learner, weigh, x, y)).items():
                memory[n] = 0.9 * memory[n] + g
                learner.params[n] = learner.params[n] - update(meta, g, memory[n])
        return val_loss(learner, val)

    args = {**task().args(), "weigh": Meta().requires_grad_(False)}
    args["meta"] = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    return Setup(loop, reference, args)
