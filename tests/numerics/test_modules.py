"""What modules do in their forwards: ties, frozen parts, in-place operations, modes."""

import copy
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam
from torch.overrides import TorchFunctionMode

from tests.numerics.families import trained
from tests.numerics.models import CLASSES, mlp, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner

SUITE = Suite()
EPS = 1e-3


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


# --- parameters


@SUITE.add()
def frozen_layer() -> Setup:
    model = mlp()
    model[0].requires_grad_(False)
    return trained(model)


@SUITE.add()
def only_the_head_is_trained() -> Setup:
    """The body requires grad and is not trained: it is a meta-parameter."""

    def loop(model, meta, batches, val):
        opt = SGD(model[2].parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        body = {n: p for n, p in model.named_parameters() if n.startswith("0.")}
        learner = Learner(model, body)
        for x, y in batches:
            grads = learner.grads(train_loss(learner, meta, x, y), ["2.weight", "2.bias"])
            learner.step(SGD, grads, lr=0.1)
        return val_loss(learner, val)

    args = task().args()
    return Setup(
        loop,
        reference,
        args,
        {**dict(args["meta"].named_parameters()), **dict(args["model"][0].named_parameters())},
    )


class Tied(nn.Module):
    """Embedding and output projection are one matrix, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(x)))).mean(1)


@SUITE.add()
def tied_weights() -> Setup:
    return trained(Tied(), "transformer")


@SUITE.add()
def one_module_used_twice() -> Setup:
    layer = nn.Linear(4, 4)
    return trained(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, CLASSES)))


@SUITE.add()
def a_parameter_without_gradient() -> Setup:
    """A layer that the loss never uses stays where it is, also under weight decay."""
    model = mlp()
    model.register_parameter("unused", nn.Parameter(torch.randn(3)))

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        for x, y in batches:
            opt.zero_grad()
            meta(F.cross_entropy(model(x), y, reduction="none"), y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            loss = meta(F.cross_entropy(learner(x), y, reduction="none"), y)
            learner.step(SGD, learner.grads(loss), lr=0.1, weight_decay=0.1)
        return val_loss(learner, val)

    args = {**task().args(), "model": model}
    return Setup(loop, reference, args, {"source": args["meta"].source})


@SUITE.add()
def dead_units_under_adam() -> Setup:
    """Exactly zero gradients: the root of Adam's second moment counts as flat there."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    with torch.no_grad():
        model[0].bias[:3] = -100.0

    def loop(model, meta, batches, val):
        opt = Adam(model.parameters(), lr=0.05, eps=EPS)
        for x, y in batches:
            opt.zero_grad()
            meta(F.cross_entropy(model(x), y, reduction="none"), y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            loss = meta(F.cross_entropy(learner(x), y, reduction="none"), y)
            learner.step(Adam, learner.grads(loss), lr=0.05, eps=EPS)
        return val_loss(learner, val)

    args = {**task().args(), "model": model}
    return Setup(loop, reference, args, {"source": args["meta"].source})


# --- in-place operations


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, CLASSES)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        h += self.shift
        h = F.silu(h, inplace=True)
        h.mul_(1.5).add_(0.1)
        h[:, 0] = h[:, 1] * 2
        out = torch.zeros(len(x), 6)
        for i in range(6):
            out[:, i] = h[:, (i + 1) % 6]
        out[:, 2:4].mul_(self.shift[2:4])
        return self.two(out.masked_fill_(x.sum(1, keepdim=True) > 4, 0.0))


@SUITE.add()
def in_place_operations() -> Setup:
    return trained(InPlace())


# --- modes and wrapped calls


class Softly(TorchFunctionMode):
    """Replaces one function by another below it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.relu:
            return F.softplus(*args)
        return func(*args, **(kwargs or {}))


class Moded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with Softly():
            h = F.relu(self.one(x))
        with torch.device("cpu"):
            scale = torch.arange(6) / 6
        return self.two(h * scale)


@SUITE.add()
def torch_function_modes() -> Setup:
    return trained(Moded())


class LowRank(nn.Module):
    """An adapter that calls its base with other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.base = mlp()
        self.a, self.b = nn.Parameter(torch.randn(6, 2) * 0.3), nn.Parameter(torch.randn(2, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        weights = {**dict(self.base.named_parameters()), "0.weight": self.base[0].weight + self.a @ self.b}
        return functional_call(self.base, weights, (x,))


@SUITE.add()
def functional_call_inside() -> Setup:
    return trained(LowRank())


@SUITE.add()
def parametrized_weight() -> Setup:
    model = mlp()

    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * torch.sigmoid(w)

    nn.utils.parametrize.register_parametrization(model[0], "weight", Symmetric())
    return trained(model)


# --- models made or copied inside the loop


@SUITE.add()
def reset_from_a_state_dict() -> Setup:
    """The loop starts from saved weights that are no meta-parameters."""

    def loop(model, meta, batches, val, start):
        model.load_state_dict(start)
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val, start):
        learner = Learner(model, {n: v.clone().requires_grad_() for n, v in start.items()})
        for x, y in batches:
            learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.1)
        return val_loss(learner, val)

    return Setup(loop, reference, {**task().args(), "start": mlp().state_dict()})


@SUITE.add(warns=r"copied by deepcopy at .*test_modules\.py.* in loop \(mlc\.clone keeps the path\)")
def deep_copy_inside() -> Setup:
    """`copy.deepcopy` cuts, as in PyTorch; `mlc.clone` is the differentiable one."""

    def loop(model, meta, batches, val):
        copied = copy.deepcopy(model)
        opt = SGD(copied.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            train_loss(copied, meta, x, y).backward()
            opt.step()
        return val_loss(copied, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.1)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())
