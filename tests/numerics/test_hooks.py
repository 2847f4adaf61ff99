"""Backward hooks: on leaves and on what a step computes, of modules, after accumulation, of optimizers.

A hook changes the gradient that the loop takes, so the loop computes another value, and differences of the loop judge
the hypergradient as ever. A reference writes into its gradients what the hook does: hooks of a Learner's tensors would
run again when its result is differentiated, which gives no derivative of the value.
"""

import copy
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from tests.numerics.models import CLASSES, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner, Tensors, clip_value

EPS = 1e-3
LIMIT = 0.01
SUITE = Suite()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


def flowing(learner: Learner, loss: Tensor, h: Tensor, f: Callable[[Tensor], Tensor]) -> Tensors:
    """Gradients of `loss` where what flows back into `h` becomes `f` of it."""
    (g,) = torch.autograd.grad(loss, h, create_graph=True)
    own = torch.autograd.grad(h, learner.parameters(), f(g) - g, create_graph=True, allow_unused=True)
    more = dict(zip(learner.params, own, strict=True))
    return {n: v if more[n] is None else v + more[n] for n, v in learner.grads(loss).items()}


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


# --- what a step computes


@SUITE.add()
def scaled_on_the_way() -> Setup:
    """The factor is learned, and a value that was made after the tensor takes part."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            opt.zero_grad()
            h = model[0](x)
            h.register_hook(lambda g: g * meta.source[1].exp() * (a.detach() > 0))  # noqa: B023
            a = torch.tanh(h)
            meta(F.cross_entropy(model[2](a), y, reduction="none"), y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            h = F.linear(x, learner.params["0.weight"], learner.params["0.bias"])
            out = F.linear(torch.tanh(h), learner.params["2.weight"], learner.params["2.bias"])
            loss = meta(F.cross_entropy(out, y, reduction="none"), y)
            scale = meta.source[1].exp() * (torch.tanh(h).detach() > 0)
            learner.step(SGD, flowing(learner, loss, h, lambda g, s=scale: g * s), lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def two_after_each_other() -> Setup:
    """The gradient that the first one sees has passed the second; the loss has one as well."""

    def loop(model, meta, batches, val):
        opt = Adam(model.parameters(), lr=0.05, eps=EPS)
        for x, y in batches:
            opt.zero_grad()
            h = model[0](x)
            h.register_hook(lambda g: torch.tanh(10 * g))
            a = model[1](h)
            a.register_hook(lambda g: g.clamp(-0.02, 0.02))
            loss = meta(F.cross_entropy(model[2](a), y, reduction="none"), y)
            loss.register_hook(lambda g: 0.5 * g)
            loss.backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        names = list(learner.params)
        for x, y in batches:
            w, b, v, c = learner.parameters()
            h = F.linear(x, w, b)
            a = torch.tanh(h)
            loss = 0.5 * meta(F.cross_entropy(F.linear(a, v, c), y, reduction="none"), y)
            ga, *late = torch.autograd.grad(loss, [a, v, c], create_graph=True)
            (gh,) = torch.autograd.grad(a, h, ga.clamp(-0.02, 0.02), create_graph=True)
            early = torch.autograd.grad(h, [w, b], torch.tanh(10 * gh), create_graph=True)
            learner.step(Adam, dict(zip(names, [*early, *late], strict=True)), lr=0.05, eps=EPS)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def put_on_after_it_was_used() -> Setup:
    """A hook belongs to the tensor, whoever has read it before; one that was removed does nothing."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            opt.zero_grad()
            h = model[0](x)
            a = model[1](h)
            h.register_hook(lambda g: g * (1 + g.abs()))
            h.register_hook(lambda g: 100 * g).remove()
            h.register_hook(lambda g: print(end=f"{g.norm():.0e}"[:0]))
            meta(F.cross_entropy(model[2](a + 0.1 * h), y, reduction="none"), y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            w, b, v, c = learner.parameters()
            h = F.linear(x, w, b)
            loss = meta(F.cross_entropy(F.linear(torch.tanh(h) + 0.1 * h, v, c), y, reduction="none"), y)
            learner.step(SGD, flowing(learner, loss, h, lambda g: g * (1 + g.abs())), lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(27, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.conv(x)).flatten(1))


@SUITE.add()
def of_a_view() -> Setup:
    """Features as rows, straight from a view of the convolution's result."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.2)
        for x, y in batches:
            opt.zero_grad()
            rows = F.silu(model.conv(x)).flatten(1)
            rows.register_hook(lambda g: g / (1 + g.norm(dim=1, keepdim=True)))
            meta(F.cross_entropy(model.head(rows), y, reduction="none"), y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            k, b, v, c = learner.parameters()
            h = F.silu(F.conv2d(x, k, b)).flatten(1)
            loss = meta(F.cross_entropy(F.linear(h, v, c), y, reduction="none"), y)
            grads = flowing(learner, loss, h, lambda g: g / (1 + g.norm(dim=1, keepdim=True)))
            learner.step(SGD, grads, lr=0.2)
        return val_loss(learner, val)

    return Setup(loop, reference, {**task("convbn").args(), "model": Rows()})


class Adversary(nn.Module):
    """Features with two heads: what is to be told, and what is not to be tellable."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.label, self.domain = nn.Linear(4, 6), nn.Linear(6, CLASSES), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.label(torch.tanh(self.features(x)))


@SUITE.add()
def gradient_reversal() -> Setup:
    """Domain adaptation (DANN): one backward, in which the features climb what the second head descends."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3, momentum=0.9)
        for x, y in batches:
            opt.zero_grad()
            f = torch.tanh(model.features(x))
            turned = f * 1.0
            turned.register_hook(lambda g: -meta.log_l2.exp() * g)
            loss = meta(F.cross_entropy(model.label(f), y, reduction="none"), y)
            (loss + F.cross_entropy(model.domain(turned), y % 2)).backward()
            opt.step()
        return val_loss(model, val) - 0.1 * F.cross_entropy(
            model.domain(torch.tanh(model.features(val[0]))), val[1] % 2
        )

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            w, b, v, c, u, d = learner.parameters()
            f = torch.tanh(F.linear(x, w, b))
            turned = f * 1.0
            loss = meta(F.cross_entropy(F.linear(f, v, c), y, reduction="none"), y)
            loss = loss + F.cross_entropy(F.linear(turned, u, d), y % 2)
            grads = flowing(learner, loss, turned, lambda g: -meta.log_l2.exp() * g)
            learner.step(SGD, grads, lr=0.3, momentum=0.9)
        w, b, _, _, u, d = learner.parameters()
        told = F.cross_entropy(F.linear(torch.tanh(F.linear(val[0], w, b)), u, d), val[1] % 2)
        return val_loss(learner, val) - 0.1 * told

    args = {**task().args(), "model": Adversary()}
    return Setup(loop, reference, args)


@SUITE.add()
def saved_gradients_are_values() -> Setup:
    """Weights of features as in Grad-CAM, from the gradient that a hook put into a list."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        saved = []
        for x, y in batches:
            opt.zero_grad()
            a = model[1](model[0](x))
            a.register_hook(saved.append)
            meta(F.cross_entropy(model[2](a), y, reduction="none"), y).backward()
            opt.step()
        alpha = torch.stack(saved).mean((0, 1))
        return val_loss(model, val) + (alpha * model[1](model[0](val[0]))).relu().sum()

    def reference(model, meta, batches, val):
        learner = Learner(model)
        saved = []
        for x, y in batches:
            w, b, v, c = learner.parameters()
            a = torch.tanh(F.linear(x, w, b))
            loss = meta(F.cross_entropy(F.linear(a, v, c), y, reduction="none"), y)
            saved += torch.autograd.grad(loss, a, create_graph=True)
            learner.step(SGD, learner.grads(loss), lr=0.3)
        w, b, *_ = learner.parameters()
        alpha = torch.stack(saved).mean((0, 1))
        return val_loss(learner, val) + (alpha * torch.tanh(F.linear(val[0], w, b))).relu().sum()

    return Setup(loop, reference, task().args())


@SUITE.add()
def what_a_hook_computes_is_no_constant() -> Setup:
    """PyTorch runs hooks without gradients, but nobody has written a cut: norms of gradients are part of the result."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        sizes = []
        for x, y in batches:
            opt.zero_grad()
            h = model[0](x)
            a = model[1](h)
            torch.autograd.graph.register_multi_grad_hook(
                [h, a], lambda gs: sizes.append((gs[0] * gs[1]).sum() * meta.source[0])
            )
            handle = model[2].bias.register_post_accumulate_grad_hook(lambda p: sizes.append(p.grad.norm()))
            meta(F.cross_entropy(model[2](a), y, reduction="none"), y).backward()
            handle.remove()
            opt.step()
        return val_loss(model, val) + torch.stack(sizes).sum()

    def reference(model, meta, batches, val):
        learner = Learner(model)
        sizes = []
        for x, y in batches:
            w, b, v, c = learner.parameters()
            h = F.linear(x, w, b)
            a = torch.tanh(h)
            loss = meta(F.cross_entropy(F.linear(a, v, c), y, reduction="none"), y)
            g, f = torch.autograd.grad(loss, [h, a], create_graph=True)
            grads = learner.grads(loss)
            sizes += [(g * f).sum() * meta.source[0], grads["2.bias"].norm()]
            learner.step(SGD, grads, lr=0.3)
        return val_loss(learner, val) + torch.stack(sizes).sum()

    return Setup(loop, reference, task().args())


@SUITE.add()
def a_kept_gradient_is_the_one_after_the_hook() -> Setup:
    """`retain_grad`, and `autograd.grad` with respect to the tensor itself, which adds to what is kept."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        more = 0.0
        for x, y in batches:
            opt.zero_grad()
            h = model[0](x)
            h.retain_grad()
            h.register_hook(lambda g: g.sin())
            loss = meta(F.cross_entropy(model[2](model[1](h)), y, reduction="none"), y)
            (g,) = torch.autograd.grad(loss, h, retain_graph=True)
            loss.backward()
            more = more + (h.grad * g).sum()
            opt.step()
        return val_loss(model, val) + more

    def reference(model, meta, batches, val):
        learner = Learner(model)
        more = 0.0
        for x, y in batches:
            w, b, v, c = learner.parameters()
            h = F.linear(x, w, b)
            loss = meta(F.cross_entropy(F.linear(torch.tanh(h), v, c), y, reduction="none"), y)
            (g,) = torch.autograd.grad(loss, h, create_graph=True)
            more = more + 2 * g.sin().square().sum()
            learner.step(SGD, flowing(learner, loss, h, torch.sin), lr=0.3)
        return val_loss(learner, val) + more

    return Setup(loop, reference, task().args())


@SUITE.add()
def of_an_attacked_input() -> Setup:
    """The step against the input has the length that a hook gives it."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            x = x.clone().requires_grad_()
            x.register_hook(lambda g: g / (g.norm() + 0.1))
            train_loss(model, meta, x, y).backward()
            worse = x.detach() + 0.5 * x.grad
            opt.zero_grad()
            train_loss(model, meta, worse, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            x = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(train_loss(learner, meta, x, y), x, create_graph=True)
            worse = x + 0.5 * g / (g.norm() + 0.1)
            params, learner.params = learner.params, {n: p.view_as(p) for n, p in learner.params.items()}
            grads = learner.grads(train_loss(learner, meta, worse.detach(), y))
            # What the loss reads of the old parameters through the input is a constant of its gradient only.
            found = torch.autograd.grad(
                train_loss(learner, meta, worse, y), list(learner.params.values()), create_graph=True
            )
            grads = dict(zip(grads, found, strict=True))
            learner.params = params
            learner.step(SGD, grads, lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


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


# --- modules


class Pair(nn.Module):
    """Two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) * 0.3)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(a @ self.weight + b), a * b


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.pair, self.head = nn.Linear(4, 6), nn.Linear(4, 6), Pair(), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pair(self.one(x), torch.tanh(self.two(x)))
        return self.head(a + 0.3 * b)


@SUITE.add()
def of_a_module() -> Setup:
    """What goes back into a module of two inputs is made smaller; what comes to another one is clipped."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        scale = torch.sigmoid(meta.source[2])
        handles = [
            model.pair.register_full_backward_hook(lambda m, gi, go: (gi[0] * scale, gi[1] + go[0] * 0.1)),
            model.head.register_full_backward_pre_hook(lambda m, go: (go[0].clamp(-0.03, 0.03),)),
        ]
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        for h in handles:
            h.remove()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        scale = torch.sigmoid(meta.source[2])
        for x, y in batches:
            p = learner.params
            one = F.linear(x, p["one.weight"], p["one.bias"])
            two = torch.tanh(F.linear(x, p["two.weight"], p["two.bias"]))
            a, b = torch.tanh(one @ p["pair.weight"] + two), one * two
            out = F.linear(a + 0.3 * b, p["head.weight"], p["head.bias"])
            main, own = meta(F.cross_entropy(out, y, reduction="none"), y), meta.penalty(learner.parameters())
            (go,) = torch.autograd.grad(main, out, create_graph=True)
            inner = [one, two, p["pair.weight"], p["head.weight"], p["head.bias"]]
            g1, g2, *late = torch.autograd.grad(out, inner, go.clamp(-0.03, 0.03), create_graph=True)
            (ga,) = torch.autograd.grad(out, a, go.clamp(-0.03, 0.03), create_graph=True)
            early = torch.autograd.grad(
                [one, two], [p[n] for n in ("one.weight", "one.bias", "two.weight", "two.bias")],
                [g1 * scale, g2 + ga * 0.1], create_graph=True,
            )  # fmt: skip
            grads = dict(zip(p, [*early, *late], strict=True))
            more = learner.grads(own)
            learner.step(SGD, {n: grads[n] + more[n] for n in p}, lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, {**task().args(), "model": Twice()})


@SUITE.add(warns="does not run when the result is differentiated")
def modules_that_are_watched() -> Setup:
    """Hooks from before the call that only look on. The last forward pass has them as well: what they would see when
    the result is differentiated is outside of the call, and mlc says so."""

    def loop(model, meta, batches, val, norms):
        opt = Adam(model.parameters(), lr=0.05, eps=EPS)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val, norms):
        model[0]._backward_hooks.clear(), model[2]._backward_hooks.clear()
        learner = Learner(model)
        for x, y in batches:
            w, b, v, c = learner.parameters()
            a = torch.tanh(F.linear(x, w, b))
            loss = train_loss(learner, meta, x, y)
            out = F.linear(a, v, c)
            (g,) = torch.autograd.grad(meta(F.cross_entropy(out, y, reduction="none"), y), out, create_graph=True)
            norms.append(g.norm().item())
            learner.step(Adam, learner.grads(loss), lr=0.05, eps=EPS)
        return val_loss(learner, val)

    norms: list[float] = []
    args = {**task().args(), "norms": norms}

    def note(module, given, made):
        norms.append(made[0].norm().item())

    args["model"][2].register_full_backward_hook(note)
    return Setup(loop, reference, args)


# --- hooks that are no backward hooks


@SUITE.add()
def before_and_after_the_optimizers_step() -> Setup:
    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)

        def clip(o, args, kwargs):
            nn.utils.clip_grad_value_(model.parameters(), LIMIT)

        def shrink(o, args, kwargs):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 - 0.1 * torch.sigmoid(meta.source[0]))

        opt.register_step_pre_hook(clip)
        opt.register_step_post_hook(shrink)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            learner.step(SGD, clip_value(learner.grads(train_loss(learner, meta, x, y)), LIMIT), lr=0.3)
            learner.params = {n: p * (1 - 0.1 * torch.sigmoid(meta.source[0])) for n, p in learner.params.items()}
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def before_and_after_the_forward() -> Setup:
    def loop(model, meta, batches, val):
        handles = [
            model[0].register_forward_pre_hook(lambda m, i: (i[0] * torch.sigmoid(meta.source[0]),)),
            model[2].register_forward_hook(lambda m, i, o: o + 0.1 * i[0][:, :CLASSES]),
        ]
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        for h in handles:
            h.remove()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            w, b, v, c = learner.parameters()
            a = torch.tanh(F.linear(x * torch.sigmoid(meta.source[0]), w, b))
            out = F.linear(a, v, c) + 0.1 * a[:, :CLASSES]
            loss = meta(F.cross_entropy(out, y, reduction="none"), y) + meta.penalty(learner.parameters())
            learner.step(SGD, learner.grads(loss), lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def of_parts_of_one_projection() -> Setup:
    """Two halves of one result, and a view of a view: each hook sees its own part."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            opt.zero_grad()
            a, b = model[0](x).chunk(2, dim=1)
            a.register_hook(lambda g: g * torch.tanh(meta.source[0]))
            turned = b.t()
            turned.register_hook(lambda g: g.clamp(-0.01, 0.01))
            out = model[2](torch.cat([torch.tanh(a) * turned.t(), b], dim=1))
            meta(F.cross_entropy(out, y, reduction="none"), y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            w, b, v, c = learner.parameters()
            one, two = F.linear(x, w, b).chunk(2, dim=1)
            turned = two * 1.0
            out = F.linear(torch.cat([torch.tanh(one) * turned, two], dim=1), v, c)
            loss = meta(F.cross_entropy(out, y, reduction="none"), y)
            grads = learner.grads(loss)
            for h, f in ((one, lambda g: g * torch.tanh(meta.source[0])), (turned, lambda g: g.clamp(-0.01, 0.01))):
                grads = {n: grads[n] + g - learner.grads(loss)[n] for n, g in flowing(learner, loss, h, f).items()}
            learner.step(SGD, grads, lr=0.3)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add(eager=False, referee="reference")
def inside_a_declared_level() -> Setup:
    """The outer gradient goes through an inner training with a hook; plain PyTorch drops that path."""

    def loop(model, meta, batches, val):
        inner = torch.zeros(CLASSES, 4, requires_grad=True)
        for x, y in batches[:2]:
            with mlc_level():
                opt = SGD([inner], lr=0.5)
                for _ in range(2):
                    opt.zero_grad()
                    h = x @ inner.t()
                    h.register_hook(lambda g: g.clamp(-0.05, 0.05) * torch.sigmoid(meta.source[0]))
                    (h - model[2](model[1](model[0](x)))).square().mean().backward()
                    opt.step()
            (g,) = torch.autograd.grad(F.cross_entropy(x @ inner.t(), y), model[2].weight)
            with torch.no_grad():
                model[2].weight -= 0.5 * g
        return val_loss(model, val) + F.cross_entropy(val[0] @ inner.t(), val[1])

    def reference(model, meta, batches, val):
        learner = Learner(model)
        inner = torch.zeros(CLASSES, 4, requires_grad=True)
        for x, y in batches[:2]:
            for _ in range(2):
                h = x @ inner.t()
                (g,) = torch.autograd.grad((h - learner(x)).square().mean(), h, create_graph=True)
                inner = inner - 0.5 * (g.clamp(-0.05, 0.05) * torch.sigmoid(meta.source[0])).t() @ x
            (g,) = torch.autograd.grad(F.cross_entropy(x @ inner.t(), y), learner.params["2.weight"], create_graph=True)
            learner.params["2.weight"] = learner.params["2.weight"] - 0.5 * g
        return val_loss(learner, val) + F.cross_entropy(val[0] @ inner.t(), val[1])

    return Setup(loop, reference, task().args())


def mlc_level():
    """`mlc.level`, looked up late: the references are judged without mlc."""
    return importlib.import_module("mlc").level("inner")


# --- later calls


def plain(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.3)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()
    return val_loss(model, val)


def outcome(fn, args: dict[str, Any]) -> list[Tensor]:
    value = fn(**args)
    return [value.detach(), *(p.detach().clone() for p in args["model"].parameters())]


def check_again(compiled, change: Callable[[dict[str, Any]], None], args: dict[str, Any]) -> None:
    """After a change, the same compiled function does what the plain one does."""
    change(args)
    other = copy.deepcopy(args)
    for one, two in zip(args["model"].modules(), other["model"].modules(), strict=True):
        two._backward_hooks = one._backward_hooks
    for one, two in zip(args["model"].parameters(), other["model"].parameters(), strict=True):
        for f in (one._backward_hooks or {}).values():
            two.register_hook(f)
        for f in (one._post_accumulate_grad_hooks or {}).values():
            two.register_post_accumulate_grad_hook(f)
    for a, b in zip(outcome(compiled, args), outcome(plain, other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_what_a_hook_reads_may_change_between_calls(mlc: ModuleType) -> None:
    scale, compiled, args = [0.5], mlc.compile(plain), task().args()
    args["model"][0].weight.register_hook(lambda g: g * scale[0])

    def tell(value: float) -> Callable[[dict[str, Any]], None]:
        return lambda args: scale.__setitem__(0, value)

    for value in (0.5, 0.5, 3.0, 0.0):
        check_again(compiled, tell(value), args)
    assert compiled.recordings == 3


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_may_come_and_go_between_calls(kind: str, mlc: ModuleType) -> None:
    def halve(x):
        if x.is_leaf and x.grad is not None:
            x.grad.mul_(0.5)
            return None
        return 0.5 * x

    compiled, args, handles = mlc.compile(plain), task().args(), []
    p = args["model"][0].weight
    for change in (
        lambda args: None,
        lambda args: handles.append(getattr(p, kind)(halve)),
        lambda args: handles.append(getattr(p, kind)(halve)),
        lambda args: handles.pop().remove(),
        lambda args: handles.pop().remove(),
    ):
        check_again(compiled, change, args)
    assert compiled.recordings == 3  # none, one, two; then known


def test_hooks_of_every_module_are_noticed(mlc: ModuleType) -> None:
    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return sum(p.square().sum() for p in model.parameters())

    def double(module, given, made):
        return (2 * given[0],) if isinstance(module, nn.Tanh) else None

    def shift(module, given, made):
        return made + 1 if isinstance(module, nn.Tanh) else made

    compiled = mlc.compile(loop)
    every = nn.modules.module
    for put, hook in (
        (every.register_module_full_backward_hook, double),
        (every.register_module_forward_hook, shift),
    ):
        for on in (False, True, False):
            handle = put(hook) if on else None
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Full backward hook is firing")
                    args = task().args()
                    other = copy.deepcopy(args)
                    got, want = compiled(**args), loop(**other)
            finally:
                if handle is not None:
                    handle.remove()
            assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-10)
    assert compiled.recordings == 3


def test_what_hooks_leave_in_lists_is_left_at_every_call(mlc: ModuleType) -> None:
    def loop(model, meta, batches, val, seen):
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            opt.zero_grad()
            h = model[0](x)
            h.register_hook(lambda g: seen.append(g.norm().item()))
            handle = model[2].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
            handle_before = model[2].weight.register_hook(lambda g: seen.append(g))
            meta(F.cross_entropy(model[2](model[1](h)), y, reduction="none"), y).backward()
            handle.remove()
            handle_before.remove()
            opt.step()
        return val_loss(model, val)

    compiled, lists = mlc.compile(loop), ([], [])
    args, other = task().args(), None
    other = copy.deepcopy(args)
    for _ in range(3):
        for fn, a, seen in ((compiled, args, lists[0]), (loop, other, lists[1])):
            seen.clear()
            fn(**a, seen=seen)
        assert len(lists[0]) == 9
        for one, two in zip(*lists, strict=True):
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=1e-9, atol=1e-12)
    assert compiled.recordings == 1


def test_the_tables_are_as_they_were(mlc: ModuleType) -> None:
    """Of tensors with hooks from before the call, whether it ends well or not."""
    args, fail = task().args(), [True]

    def hook(g):
        if fail[0]:
            raise ValueError("in a hook of the user's")

    p = args["model"][0].weight
    handle = p.register_hook(hook)
    with pytest.raises(ValueError, match="of the user's"):
        mlc.compile(plain)(**args)
    assert dict(p._backward_hooks) == {handle.id: hook}
    fail[0] = False
    mlc.compile(plain)(**args)
    assert dict(p._backward_hooks) == {handle.id: hook}


@pytest.mark.parametrize("copied", [False, True])
def test_gradients_of_what_was_made_before_the_call_are_seen_outside(copied: bool, mlc: ModuleType) -> None:
    """A hook in the loop is refused with a way round, and that works."""

    def loop(model, meta, batches, val, inside):
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            w = 2 * meta if copied else meta
            if inside:
                w.register_hook(lambda g: 3 * g)
            opt.zero_grad()
            (w[y] * F.cross_entropy(model(x), y, reduction="none")).mean().backward(retain_graph=True)
            opt.step()
        return val_loss(model, val)

    args, source = task().args(), torch.randn(CLASSES, requires_grad=True)
    with pytest.raises(mlc.MlcError, match=r"computed before the call[\s\S]*(outside of|before) the call"):
        mlc.compile(loop)(**{**args, "meta": torch.sigmoid(source)}, inside=True)
    found = []
    for factor in (None, 3):
        args, weights = task().args(), torch.sigmoid(source)
        if factor is not None:
            weights.register_hook(lambda g: 3 * g)
        torch.manual_seed(2)
        for p in args["model"].parameters():
            p.data = torch.randn_like(p)
        data = [(torch.ones(6, 4) * i, torch.arange(6) % CLASSES) for i in range(1, 4)]
        out = mlc.compile(loop)(**{**args, "meta": weights, "batches": data, "val": data[0]}, inside=False)
        found += torch.autograd.grad(out, source)
    torch.testing.assert_close(found[1], 3 * found[0])


def test_errors_of_pytorch_name_the_hook(mlc: ModuleType) -> None:
    def of_another_shape(g):
        return g.sum()

    args = task().args()
    args["model"][0].weight.register_hook(of_another_shape)
    with pytest.raises(RuntimeError, match="of_another_shape"):
        mlc.compile(plain)(**args)


def test_check_agrees(mlc: ModuleType) -> None:
    """`mlc.check` compares with a plain unroll and with differences."""
    setup = next(p for p in SUITE if p.name == "scaled_on_the_way").fresh()
    report = mlc.check(setup.loop, **setup.args)
    assert report.ok, str(report)
