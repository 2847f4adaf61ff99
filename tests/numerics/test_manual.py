"""Updates written by hand, and gradients inside a step."""

from types import ModuleType

import torch
from torch import nn
from torch.optim import SGD, Adam

from tests.numerics.models import task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner

SUITE = Suite()
EPS = 1e-3


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


# --- parameters written by hand


def by_hand(write) -> Setup:
    def loop(model, meta, batches, val):
        for x, y in batches:
            model.zero_grad()
            train_loss(model, meta, x, y).backward()
            write(model)
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.1)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def minus_equals() -> Setup:
    def write(model):
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad

    return by_hand(write)


@SUITE.add()
def sub_() -> Setup:
    @torch.no_grad()
    def write(model):
        for p in model.parameters():
            p.sub_(p.grad, alpha=0.1)

    return by_hand(write)


@SUITE.add()
def data_add_() -> Setup:
    def write(model):
        for p in model.parameters():
            p.data.add_(p.grad.data, alpha=-0.1)

    return by_hand(write)


@SUITE.add()
def copy_() -> Setup:
    def write(model):
        with torch.no_grad():
            for p in model.parameters():
                step = 0.1 * p.grad
                p.copy_(p - step)

    return by_hand(write)


@SUITE.add()
def through_a_detached_alias() -> Setup:
    def write(model):
        for p in model.parameters():
            p.detach().sub_(0.1 * p.grad)

    return by_hand(write)


@SUITE.add()
def through_a_flat_vector() -> Setup:
    """Gradients flattened into one vector, parameters written back from it."""

    def write(model):
        params = list(model.parameters())
        flat = nn.utils.parameters_to_vector(params).detach()
        grad = torch.cat([p.grad.reshape(-1) for p in params])
        with torch.no_grad():
            start = 0
            for p in params:
                p.copy_((flat - 0.1 * grad)[start : start + p.numel()].view_as(p))
                start += p.numel()

    return by_hand(write)


@SUITE.add()
def grad_of_a_list_without_backward() -> Setup:
    def loop(model, meta, batches, val):
        params = list(model.parameters())
        for x, y in batches:
            grads = torch.autograd.grad(train_loss(model, meta, x, y), params)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p.sub_(0.1 * g)
        return val_loss(model, val)

    return Setup(loop, by_hand(None).reference, task().args())


@SUITE.add()
def a_tensor_trained_by_hand() -> Setup:
    """No module and no optimizer: least squares with learned row weights."""

    def loop(a, b, meta):
        w = torch.zeros(3, requires_grad=True)
        for _ in range(4):
            loss = (torch.sigmoid(meta) * (a @ w - b).square()).mean()
            (g,) = torch.autograd.grad(loss, w)
            w.data -= 0.2 * g
        return (a @ w - b).square().mean()

    def reference(a, b, meta):
        w = torch.zeros(3, requires_grad=True)
        for _ in range(4):
            loss = (torch.sigmoid(meta) * (a @ w - b).square()).mean()
            w = w - 0.2 * torch.autograd.grad(loss, w, create_graph=True)[0]
        return (a @ w - b).square().mean()

    return Setup(loop, reference, {"a": torch.randn(6, 3), "b": torch.randn(6), "meta": nn.Parameter(torch.randn(6))})


# --- a gradient inside a step


def aliases(learner: Learner) -> Learner:
    """The same parameters as new variables: gradients with respect to these stop there."""
    return Learner(learner.module, {n: p.view_as(p) for n, p in learner.params.items()})


def penalised(loss_of) -> Setup:
    def loop(model, meta, batches, val):
        opt = Adam(model.parameters(), lr=0.05, eps=EPS)
        for x, y in batches:
            opt.zero_grad()
            loss_of(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            learner.step(Adam, learner.grads(loss_of(learner, meta, x, y)), lr=0.05, eps=EPS)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def gradient_penalty_on_parameters() -> Setup:
    def loss_of(model, meta, x, y):
        loss = train_loss(model, meta, x, y)
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + 0.1 * sum(g.square().sum() for g in grads)

    return penalised(loss_of)


@SUITE.add()
def gradient_penalty_on_inputs() -> Setup:
    def loss_of(model, meta, x, y):
        x = x.clone().requires_grad_()
        loss = train_loss(model, meta, x, y)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + (g.flatten(1).norm(dim=1) - 0.1).square().mean()

    return penalised(loss_of)


@SUITE.add(warns="as in PyTorch")
def adversarial_inputs() -> Setup:
    """An attack taken without `create_graph`: no part of the next inner gradient, yet it moves with meta."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            x = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(train_loss(model, meta, x, y), x)
            opt.zero_grad()
            train_loss(model, meta, x.detach() + 0.3 * g, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            x = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(train_loss(learner, meta, x, y), x, create_graph=True)
            there = aliases(learner)  # the attack is data for the second inner gradient
            learner.step(SGD, there.grads(train_loss(there, meta, x.detach() + 0.3 * g, y)), lr=0.1)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def sharpness_aware() -> Setup:
    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            with torch.no_grad():
                norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                moves = [p.grad * (0.05 / (norm + 1e-12)) for p in model.parameters()]
                for p, e in zip(model.parameters(), moves, strict=True):
                    p.add_(e)
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            with torch.no_grad():
                for p, e in zip(model.parameters(), moves, strict=True):
                    p.sub_(e)
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            grads = learner.grads(train_loss(learner, meta, x, y))
            scale = 0.05 / (sum(g.square().sum() for g in grads.values()).sqrt() + 1e-12)
            there = Learner(model, {n: p + scale * grads[n] for n, p in learner.params.items()})
            learner.step(SGD, there.grads(train_loss(there, meta, x, y)), lr=0.1, momentum=0.9)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())
