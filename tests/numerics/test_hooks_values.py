"""Backward hooks on what a step computes: activations, views, inputs (see `test_hooks` for the references)."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from tests.numerics.models import CLASSES, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner, flowing

EPS = 1e-3
LIMIT = 0.01
SUITE = Suite()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


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
