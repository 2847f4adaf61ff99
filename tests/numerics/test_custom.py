"""Custom autograd Functions and autocast, held against what PyTorch's own double backward makes of them."""

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.numerics.families import trained
from tests.numerics.models import CLASSES, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference, reference_gradients
from tests.numerics.reference import Learner, worst

SUITE = Suite()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


class Swish(torch.autograd.Function):
    """A true derivative, written by hand."""

    @staticmethod
    def forward(ctx, x, beta):
        ctx.save_for_backward(x, beta)
        return x * torch.sigmoid(beta * x)

    @staticmethod
    def backward(ctx, g):
        x, beta = ctx.saved_tensors
        s = torch.sigmoid(beta * x)
        slope = s * (1 - s)
        return g * (s + beta * x * slope), (g * x * x * slope).sum()


class Exponential(torch.autograd.Function):
    """Saves its output; written in the two-method style."""

    @staticmethod
    def forward(x):
        return torch.exp(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (out,) = ctx.saved_tensors
        return g * out


class Cubic(torch.autograd.Function):
    """The forward works under no_grad as always; an integer rides along and has no gradient."""

    @staticmethod
    def forward(ctx, x, power):
        ctx.power = power
        ctx.save_for_backward(x)
        return x**power, x.detach().abs().max()

    @staticmethod
    def backward(ctx, g, _):
        (x,) = ctx.saved_tensors
        return g * ctx.power * x ** (ctx.power - 1), None


class Round(torch.autograd.Function):
    """Straight-through: the backward is the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, g):
        return g


class Surrogate(torch.autograd.Function):
    """A step whose stated derivative is smooth: the second derivative is that of the statement."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (1 + x.square()) ** 2


class Reverse(torch.autograd.Function):
    """Gradient reversal, as in domain adaptation: the stated derivative is not the true one."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.scale * g * torch.tanh(g), None


class Apply(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, CLASSES)
        self.beta = nn.Parameter(torch.tensor(0.8))
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.f(self.one(x), self.beta))


@SUITE.add()
def a_true_derivative() -> Setup:
    return trained(Apply(Swish.apply))


@SUITE.add()
def a_saved_output() -> Setup:
    return trained(Apply(lambda x, beta: Exponential.apply(-beta * x * x)))


@SUITE.add()
def several_outputs() -> Setup:
    def f(x, beta):
        out, top = Cubic.apply(torch.tanh(x), 3)
        return beta * out + 0.0 * top

    return trained(Apply(f))


@SUITE.add(referee="none")
def straight_through() -> Setup:
    """Differences see the steps of the rounding, not its stated derivative."""
    return trained(Apply(lambda x, beta: beta * Round.apply(torch.tanh(x))))


@SUITE.add(referee="none")
def surrogate_slope() -> Setup:
    """Differences see a step function."""
    return trained(Apply(lambda x, beta: beta * Surrogate.apply(x)))


@SUITE.add(referee="none")
def straight_through_by_detach() -> Setup:
    """The same trick without a Function; a detached value stops at every level."""
    return trained(Apply(lambda x, beta: beta * x + (torch.round(4 * x) / 4 - x).detach()))


@SUITE.add(referee="none")
def gradient_reversal() -> Setup:
    """Differences see the identity."""
    return trained(Apply(lambda x, beta: torch.tanh(beta * Reverse.apply(x, 0.7))))


class Normed(Apply):
    """Normalised first: the saved statistics carry no derivative, and the Function has only a reverse rule."""

    def __init__(self, f) -> None:
        super().__init__(f)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.f(self.norm(self.one(x)), self.beta))


@SUITE.add()
def after_a_batch_norm() -> Setup:
    return trained(Normed(Swish.apply))


@SUITE.add(referee="none")
def straight_through_after_a_batch_norm() -> Setup:
    """Differences see the steps of the rounding, not its stated derivative."""
    return trained(Normed(lambda x, beta: beta * Round.apply(torch.tanh(x))))


class Pass(torch.autograd.Function):
    """Returns its input as a view; the gradient is clipped, a statement that is not linear."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.02, 0.02)


@SUITE.add(referee="none")
def clipped_beside_the_plain_path() -> Setup:
    """The input is used directly as well. Differences see the identity."""
    return trained(Apply(lambda x, beta: torch.tanh(beta * (x + Pass.apply(x)))))


class Quantised(nn.Module):
    """Functions of the weights alone: the first thing that happens in a step."""

    def __init__(self, f) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, CLASSES)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear(x, self.f(self.one.weight), self.one.bias))
        return nn.functional.linear(h, self.f(self.two.weight), self.two.bias)


@SUITE.add(referee="none")
def quantised_weights() -> Setup:
    """Quantisation-aware training. Differences see the steps."""
    return trained(Quantised(Round.apply))


@SUITE.add()
def a_true_derivative_of_the_weights() -> Setup:
    return trained(Quantised(lambda w: Swish.apply(w, torch.tensor(2.0))))


def mixed(enabled: bool) -> Setup:
    """float32 parameters, bfloat16 products."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x, y in batches:
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = train_loss(model, meta, x, y)
            loss.backward()
            opt.step()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = train_loss(learner, meta, x, y)
            learner.step(SGD, learner.grads(loss), lr=0.1, momentum=0.9)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return val_loss(learner, val)

    args = task().args()
    args["model"].float()
    args["meta"].float()
    args["batches"] = [(x.float(), y) for x, y in args["batches"]]
    args["val"] = (args["val"][0].float(), args["val"][1])
    return Setup(loop, reference, args)


AUTOCAST = Program(lambda: mixed(True), referee="none", tolerance=3e-2)


def test_the_autocast_reference_is_near_full_precision() -> None:
    full = reference_gradients(Program(lambda: mixed(False)))
    error, name = worst(reference_gradients(AUTOCAST), full)
    assert 1e-5 < error < 0.1, name


def test_autocast(mlc: ModuleType) -> None:
    check_compiled(AUTOCAST, mlc)


def test_autocast_keeps_the_types_of_the_parameters(mlc: ModuleType) -> None:
    setup = AUTOCAST.fresh()
    loss = mlc.compile(setup.loop)(**setup.args)
    loss.backward()
    assert {p.dtype for p in setup.args["model"].parameters()} == {torch.float32}
    assert {p.grad.dtype for p in setup.args["meta"].parameters()} == {torch.float32}


def test_single_precision(mlc: ModuleType) -> None:
    """Ordinary float32 programs: close to the same program's reference in float32."""
    check_compiled(Program(lambda: mixed(False), referee="none", tolerance=2e-4), mlc)
