"""Fast weights: MAML spelt out, and through `mlc.clone`."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam

from tests.numerics.models import Meta, mlp, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner

SUITE = Suite()
EPS = 1e-3


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


def regression(tasks: int = 3) -> dict:
    net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))

    def wave():
        x, phase = torch.randn(5, 1), torch.rand(())
        return x, torch.sin(x + phase)

    return {"meta": net, "tasks": [(wave(), wave()) for _ in range(tasks)]}


def maml_reference(meta, tasks, steps=2, lr=0.1):
    total = torch.zeros(())
    for (x, y), (qx, qy) in tasks:
        fast = Learner(meta, dict(meta.named_parameters()))
        for _ in range(steps):
            fast.step(SGD, fast.grads(F.mse_loss(fast(x), y)), lr=lr)
        total = total + F.mse_loss(fast(qx), qy)
    return total / len(tasks)


@SUITE.add()
def maml_with_functional_call() -> Setup:
    def loop(meta, tasks):
        total = torch.zeros(())
        for (x, y), (qx, qy) in tasks:
            fast = dict(meta.named_parameters())
            for _ in range(2):
                loss = F.mse_loss(functional_call(meta, fast, (x,)), y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            total = total + F.mse_loss(functional_call(meta, fast, (qx,)), qy)
        return total / len(tasks)

    return Setup(loop, maml_reference, regression())


@SUITE.add()
def maml_with_explicit_weights() -> Setup:
    """Weights as a plain list, the forward spelt out."""

    def forward(w: list[Tensor], x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, w[0], w[1])), w[2], w[3])

    def loop(meta, tasks):
        losses = []
        for (x, y), (qx, qy) in tasks:
            w = [p.clone() for p in meta.parameters()]
            for _ in range(2):
                grads = torch.autograd.grad(F.mse_loss(forward(w, x), y), w, create_graph=True)
                w = [p - 0.1 * g for p, g in zip(w, grads, strict=True)]
            losses.append(F.mse_loss(forward(w, qx), qy))
        return torch.stack(losses).mean()

    return Setup(loop, maml_reference, regression())


@SUITE.add()
def maml_without_create_graph() -> Setup:
    """Nobody asked for a graph of the gradient; it is second order all the same."""

    def loop(meta, tasks):
        total = torch.zeros(())
        for (x, y), (qx, qy) in tasks:
            fast = dict(meta.named_parameters())
            for _ in range(2):
                loss = F.mse_loss(functional_call(meta, fast, (x,)), y)
                grads = torch.autograd.grad(loss, list(fast.values()))
                fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            total = total + F.mse_loss(functional_call(meta, fast, (qx,)), qy)
        return total / len(tasks)

    return Setup(loop, maml_reference, regression())


@SUITE.add(clones=True)
def maml_with_clone_and_optimizer(clone) -> Setup:
    def loop(meta, tasks):
        total = torch.zeros(())
        for (x, y), (qx, qy) in tasks:
            learner = clone(meta)
            opt = SGD(learner.parameters(), lr=0.1)
            for _ in range(2):
                opt.zero_grad()
                F.mse_loss(learner(x), y).backward()
                opt.step()
            total = total + F.mse_loss(learner(qx), qy)
        return total / len(tasks)

    return Setup(loop, maml_reference, regression())


@SUITE.add(clones=True)
def clone_written_by_hand(clone) -> Setup:
    def loop(meta, tasks):
        total = torch.zeros(())
        for (x, y), (qx, qy) in tasks:
            learner = clone(meta)
            for _ in range(2):
                learner.zero_grad()
                F.mse_loss(learner(x), y).backward()
                with torch.no_grad():
                    for p in learner.parameters():
                        p.sub_(0.1 * p.grad)
            total = total + F.mse_loss(learner(qx), qy)
        return total / len(tasks)

    return Setup(loop, maml_reference, regression())


@SUITE.add(clones=True)
def initialisation_through_adam(clone) -> Setup:
    """The learned starting point of one longer run."""

    def loop(meta, weigh, batches, val):
        learner = clone(meta)
        opt = Adam(learner.parameters(), lr=0.05, eps=EPS)
        for x, y in batches:
            opt.zero_grad()
            train_loss(learner, weigh, x, y).backward()
            opt.step()
        return val_loss(learner, val)

    def reference(meta, weigh, batches, val):
        learner = Learner(meta, dict(meta.named_parameters()))
        for x, y in batches:
            learner.step(Adam, learner.grads(train_loss(learner, weigh, x, y)), lr=0.05, eps=EPS)
        return val_loss(learner, val)

    args = task().args()
    del args["model"]
    return Setup(loop, reference, {**args, "meta": mlp(), "weigh": Meta().requires_grad_(False)})
