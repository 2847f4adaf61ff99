"""Backward hooks: on leaves and on what a step computes, of modules, after accumulation, of optimizers.

A hook changes the gradient that the loop takes, so the loop computes another value, and differences of the loop judge
the hypergradient as ever. A reference writes into its gradients what the hook does: hooks of a Learner's tensors would
run again when its result is differentiated, which gives no derivative of the value.
"""

from types import ModuleType

import torch
from torch.optim import SGD, Adam

from tests.numerics.models import task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner, clip_value

EPS = 1e-3
LIMIT = 0.01
SUITE = Suite()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


# --- parameters


@SUITE.add()
def clipped_by_hooks_from_before_the_call() -> Setup:
    def loop(model, meta, batches, val):
        opt = Adam(model.parameters(), lr=0.05, eps=EPS)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            grads = clip_value(learner.grads(train_loss(learner, meta, x, y)), LIMIT)
            learner.step(Adam, grads, lr=0.05, eps=EPS)
        return val_loss(learner, val)

    args = task().args()
    for p in args["model"].parameters():
        p.register_hook(lambda g: g.clamp(-LIMIT, LIMIT))
    return Setup(loop, reference, args)


@SUITE.add()
def put_on_and_taken_off_in_every_step() -> Setup:
    """The factor is learned; two hooks of one parameter run in their order."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3, momentum=0.9)
        for x, y in batches:
            opt.zero_grad()
            w = model[0].weight
            handles = [w.register_hook(lambda g: g * meta.source[0].exp()), w.register_hook(torch.tanh)]
            train_loss(model, meta, x, y).backward()
            for h in handles:
                h.remove()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            grads = learner.grads(train_loss(learner, meta, x, y))
            grads["0.weight"] = torch.tanh(grads["0.weight"] * meta.source[0].exp())
            learner.step(SGD, grads, lr=0.3, momentum=0.9)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def masked_by_a_hook() -> Setup:
    """Part of a weight stays as it is; the update is written by hand, and the mask lies in a closure."""
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])

    def loop(model, meta, batches, val):
        handle = model[0].weight.register_hook(lambda g: g * mask)
        for x, y in batches:
            train_loss(model, meta, x, y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.3 * p.grad
                    p.grad = None
        handle.remove()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            grads = learner.grads(train_loss(learner, meta, x, y))
            grads["0.weight"] = grads["0.weight"] * mask
            learner.step(SGD, grads, lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def once_for_every_backward() -> Setup:
    """Two halves of a batch are accumulated: the hook sees each by itself, and clips by the norm."""

    def clip(g):
        return g * (LIMIT / g.norm()) if g.norm() > LIMIT else None

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        handle = model[2].weight.register_hook(clip)
        for x, y in batches:
            opt.zero_grad()
            for part in (slice(0, 3), slice(3, 6)):
                train_loss(model, meta, x[part], y[part]).backward()
            opt.step()
        handle.remove()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            one, two = (learner.grads(train_loss(learner, meta, x[s], y[s])) for s in (slice(0, 3), slice(3, 6)))
            for part in (one, two):
                g = part["2.weight"]
                part["2.weight"] = g * (LIMIT / g.norm()) if g.norm() > LIMIT else g
            learner.step(SGD, {n: one[n] + two[n] for n in one}, lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def of_autograd_grad() -> Setup:
    """`autograd.grad` runs the hooks of its inputs, too."""

    def loop(model, meta, batches, val):
        handles = [p.register_hook(lambda g: g + 0.1 * g.square()) for p in model.parameters()]
        for x, y in batches:
            grads = torch.autograd.grad(train_loss(model, meta, x, y), list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p.sub_(g, alpha=0.3)
        for h in handles:
            h.remove()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            grads = learner.grads(train_loss(learner, meta, x, y))
            learner.step(SGD, {n: g + 0.1 * g.square() for n, g in grads.items()}, lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def noise_on_the_gradient() -> Setup:
    """Drawn in the hook, from the global generator."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        handle = model[0].bias.register_hook(lambda g: g * (1 + 0.1 * torch.randn_like(g)))
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        handle.remove()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            grads = learner.grads(train_loss(learner, meta, x, y))
            grads["0.bias"] = grads["0.bias"] * (1 + 0.1 * torch.randn_like(grads["0.bias"]))
            learner.step(SGD, grads, lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


# --- after accumulation


@SUITE.add()
def optimizer_in_the_backward() -> Setup:
    """Every parameter is stepped as soon as its gradient is there, and the gradient let go."""

    def loop(model, meta, batches, val):
        opts = {p: SGD([p], lr=0.3, momentum=0.9) for p in model.parameters()}

        def update(p):
            opts[p].step()
            opts[p].zero_grad()

        handles = [p.register_post_accumulate_grad_hook(update) for p in model.parameters()]
        for x, y in batches:
            train_loss(model, meta, x, y).backward()
        for h in handles:
            h.remove()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.3, momentum=0.9)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def clipped_in_place_after_accumulation() -> Setup:
    """Over epochs; the hooks were there before the call."""

    def loop(model, meta, batches, val):
        opt = Adam(model.parameters(), lr=0.05, eps=EPS)
        for _ in range(2):
            for x, y in batches:
                opt.zero_grad()
                train_loss(model, meta, x, y).backward()
                opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in [*batches, *batches]:
            grads = clip_value(learner.grads(train_loss(learner, meta, x, y)), LIMIT)
            learner.step(Adam, grads, lr=0.05, eps=EPS)
        return val_loss(learner, val)

    def clip(p):
        p.grad.clamp_(-LIMIT, LIMIT)

    args = task().args()
    for p in args["model"].parameters():
        p.register_post_accumulate_grad_hook(clip)
    return Setup(loop, reference, args)
