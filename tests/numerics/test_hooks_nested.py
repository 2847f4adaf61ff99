"""Hooks that take or pass gradients of gradients: other gradients, fast weights, penalties."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch.optim import SGD

from tests.numerics.models import task, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner, flowing

EPS = 1e-3
LIMIT = 0.01
SUITE = Suite()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


@SUITE.add()
def hooks_that_look_at_other_gradients() -> Setup:
    """What is accumulated already is changed by the hook of an activation, and by that of a parameter."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3, momentum=0.9)

        def shrink(g):
            for p in model[2].parameters():
                p.grad = 0.8 * p.grad
            return 2 * g

        def grow(p):
            for q in model.parameters():
                if q.grad is not None and q is not p:
                    q.grad.mul_(1.1)

        handle = model[0].bias.register_post_accumulate_grad_hook(grow)
        for x, y in batches:
            opt.zero_grad()
            h = model[0](x)
            h.register_hook(shrink)
            meta(F.cross_entropy(model[2](model[1](h)), y, reduction="none"), y).backward()
            opt.step()
        handle.remove()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            w, b, v, c = learner.parameters()
            h = F.linear(x, w, b)
            loss = meta(F.cross_entropy(F.linear(torch.tanh(h), v, c), y, reduction="none"), y)
            grads = flowing(learner, loss, h, lambda g: 2 * g)
            for n in ("2.weight", "2.bias"):
                grads[n] = 1.1 * 0.8 * grads[n]
            learner.step(SGD, grads, lr=0.3, momentum=0.9)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add(warns="does not run when the result is differentiated")
def fast_weights() -> Setup:
    """Steps taken with `create_graph`: PyTorch would run the hook on the hypergradient, too, which is no derivative."""

    def loop(model, meta, batches, val):
        fast = list(model.parameters())
        for x, y in batches:
            h = F.linear(x, fast[0], fast[1])
            h.register_hook(lambda g: g.clamp(-0.02, 0.02))
            out = F.linear(torch.tanh(h), fast[2], fast[3])
            loss = meta(F.cross_entropy(out, y, reduction="none"), y)
            grads = torch.autograd.grad(loss, fast, create_graph=True)
            fast = [p - 0.3 * g for p, g in zip(fast, grads, strict=True)]
        return F.cross_entropy(F.linear(torch.tanh(F.linear(val[0], fast[0], fast[1])), fast[2], fast[3]), val[1])

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            w, b, v, c = learner.parameters()
            h = F.linear(x, w, b)
            loss = meta(F.cross_entropy(F.linear(torch.tanh(h), v, c), y, reduction="none"), y)
            learner.step(SGD, flowing(learner, loss, h, lambda g: g.clamp(-0.02, 0.02)), lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def a_gradient_penalty() -> Setup:
    """The hook runs twice: for the gradient that is penalised, and for that of the loss with the penalty."""

    def bend(g):
        return g * torch.tanh(3 + g)

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.2)
        for x, y in batches:
            opt.zero_grad()
            x = x.clone().requires_grad_()
            h = model[0](x)
            h.register_hook(bend)
            loss = meta(F.cross_entropy(model[2](model[1](h)), y, reduction="none"), y)
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + g.square().sum()).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            w, b, v, c = learner.parameters()
            x = x.clone().requires_grad_()
            h = F.linear(x, w, b)
            loss = meta(F.cross_entropy(F.linear(torch.tanh(h), v, c), y, reduction="none"), y)
            (gh,) = torch.autograd.grad(loss, h, create_graph=True)
            (g,) = torch.autograd.grad(h, x, bend(gh), create_graph=True)
            learner.step(SGD, flowing(learner, loss + g.square().sum(), h, bend), lr=0.2)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())
