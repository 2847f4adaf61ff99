"""What a forward leaves behind: buffers that it writes, random draws that its backward must see again."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

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


@SUITE.add(referee="none", stop="torch")
def batch_norm_evaluated() -> Setup:
    """As PyTorch's own autograd has it, running statistics are constants: differences would see them move."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
        model.train()
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        model.eval()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        model.train()
        learner = Learner(model)
        for x, y in batches:
            learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.1, momentum=0.9)
        model.eval()
        return val_loss(learner, val)

    return Setup(loop, reference, task("convbn").args())


class Drop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.tanh(self.one(x)), 0.4, self.training)
        return self.two(h + 0.1 * torch.randn_like(h) * torch.rand(h.shape[1]))


@SUITE.add()
def dropout_and_noise() -> Setup:
    return trained(Drop())


@SUITE.add()
def dropout_layers_of_several_kinds() -> Setup:
    layers = [nn.Conv2d(1, 4, 3), nn.Dropout2d(0.3), nn.SiLU(), nn.AlphaDropout(0.2), nn.Flatten()]
    return trained(nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(36, CLASSES)), "convbn")


@SUITE.add()
def random_choices_of_data() -> Setup:
    """Permutations, random integers and Bernoulli draws choose what a step sees."""

    def pick(x, y):
        order = torch.randperm(len(x))[:4]
        flip = torch.where(torch.rand(4, 1) < 0.5, -1.0, 1.0)
        return x[order] * flip * torch.bernoulli(torch.full((4, 4), 0.8)), y[order].roll(1)

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, *pick(x, y)).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            learner.step(SGD, learner.grads(train_loss(learner, meta, *pick(x, y))), lr=0.1)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def a_generator_of_ones_own() -> Setup:
    def loop(model, meta, batches, val, gen):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            noise = torch.randn(x.shape, generator=gen)
            train_loss(model, meta, x + 0.3 * noise, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val, gen):
        learner = Learner(model)
        for x, y in batches:
            noise = torch.randn(x.shape, generator=gen)
            learner.step(SGD, learner.grads(train_loss(learner, meta, x + 0.3 * noise, y)), lr=0.1)
        return val_loss(learner, val)

    return Setup(loop, reference, {**task().args(), "gen": torch.Generator().manual_seed(5)})


class Counting(nn.Module):
    """A buffer of its own: a running mean that the forward uses and updates."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.2)
                self.seen += 1
        return self.net(x - self.mean)


@SUITE.add()
def buffers_of_ones_own() -> Setup:
    return trained(Counting())
