"""Hooks of modules, backward and forward, and of the optimizer's step."""

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from tests.numerics.models import CLASSES, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner, clip_value, flowing

EPS = 1e-3
LIMIT = 0.01
SUITE = Suite()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


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
