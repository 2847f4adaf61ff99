"""Loops without an inner gradient, and loops within loops to three levels."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mlc
from tests.numerics.models import Meta, draw, mlp, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner

SUITE = Suite()
EPS = 1e-3
THREE = 1e-8


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


# --- no inner gradient


@SUITE.add()
def a_simulator() -> Setup:
    """A pendulum stepped by leapfrog under a learned force."""

    def loop(meta, start, target):
        angle, speed = start
        for _ in range(12):
            speed = speed - 0.1 * (torch.sin(angle) + meta(angle[:, None]).squeeze(1))
            angle = angle + 0.1 * speed
        return (angle - target).square().mean()

    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    start = (torch.randn(5), torch.randn(5))
    return Setup(loop, loop, {"meta": net, "start": start, "target": torch.randn(5)})


@SUITE.add()
def a_sampler() -> Setup:
    """Langevin-like steps with fresh noise: the step size and the drift are learned."""

    def loop(meta, x):
        path = [x]
        for _ in range(6):
            drift = torch.tanh(path[-1] @ meta["drift"])
            rate = meta["log_rate"].exp()
            path.append(path[-1] + rate * drift + (2 * rate).sqrt() * 0.1 * torch.randn_like(x))
        return torch.stack(path).square().mean() + path[-1].abs().mean()

    meta = {
        "drift": torch.randn(3, 3, requires_grad=True),
        "log_rate": torch.tensor(-2.0, requires_grad=True),
    }
    return Setup(loop, loop, {"meta": meta, "x": torch.randn(4, 3)})


@SUITE.add()
def a_recurrence_in_place() -> Setup:
    def loop(meta, x):
        state, trace = torch.zeros(4), torch.zeros(5, 4)
        for t in range(5):
            state = torch.tanh(meta @ state + x[t])
            trace[t] = state
        return trace.square().sum()

    return Setup(loop, loop, {"meta": nn.Parameter(torch.randn(4, 4)), "x": torch.randn(5, 4)})


@SUITE.add()
def no_loop_at_all() -> Setup:
    def loop(meta, x):
        return F.softplus(meta(x)).mean()

    return Setup(loop, loop, {"meta": mlp(), "x": torch.randn(5, 4)})


# --- two levels side by side


@SUITE.add()
def one_run_after_another() -> Setup:
    """The second model is trained on what the first one predicts."""

    def student_loss(student, teacher, meta, x):
        return F.mse_loss(student(x), teacher(x)) + meta.penalty(student.parameters())

    def loop(model, student, meta, batches, val):
        for net in (model, student):
            opt = SGD(net.parameters(), lr=0.1)
            for x, y in batches:
                opt.zero_grad()
                if net is model:
                    train_loss(model, meta, x, y).backward()
                else:
                    student_loss(student, model, meta, x).backward()
                opt.step()
        return val_loss(student, val)

    def reference(model, student, meta, batches, val):
        first, second = Learner(model), Learner(student)
        for x, y in batches:
            first.step(SGD, first.grads(train_loss(first, meta, x, y)), lr=0.1)
        for x, _ in batches:
            second.step(SGD, second.grads(student_loss(second, first, meta, x)), lr=0.1)
        return val_loss(second, val)

    return Setup(loop, reference, {**task().args(), "student": mlp()})


# --- three levels


def ridge(w: Tensor, weights: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
    a, b = data
    return (torch.sigmoid(weights) * (torch.tanh(a @ w) - b).square()).mean()


def regression(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3), torch.randn(n).tanh()


@SUITE.add(tolerance=THREE)
def three_levels_of_fast_weights() -> Setup:
    """Everything by `autograd.grad(create_graph=True)`: plain PyTorch means the same number."""

    def loop(meta, inner, middle, outer):
        weights = torch.zeros(len(inner[1]), requires_grad=True)
        for _ in range(3):
            w = torch.zeros(3, requires_grad=True)
            for _ in range(3):
                (g,) = torch.autograd.grad(ridge(w, weights, inner), w, create_graph=True)
                w = w - 0.5 * g
            (h,) = torch.autograd.grad(ridge(w, meta, middle), weights, create_graph=True)
            weights = weights - 2.0 * h
        w = torch.zeros(3, requires_grad=True)
        for _ in range(3):
            (g,) = torch.autograd.grad(ridge(w, weights, inner), w, create_graph=True)
            w = w - 0.5 * g
        a, b = outer
        return (torch.tanh(a @ w) - b).square().mean()

    data = {"inner": regression(6), "middle": regression(5), "outer": regression(7)}
    return Setup(loop, loop, {"meta": nn.Parameter(torch.randn(5)), **data})


class Squared(torch.autograd.Function):
    """A custom function: a gradient through it is differentiated in reverse over reverse."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


def nested(inner_cls, inner_given, middle_cls, middle_given, custom=False) -> Setup:
    """Three levels of ordinary optimizers: `meta` weighs the validation that trains the class weights."""

    def middle_loss(model, meta, val):
        losses = F.cross_entropy(model(val[0]), val[1], reduction="none")
        return (torch.sigmoid(meta) * (Squared.apply(losses) if custom else losses)).mean()

    def loop(model, start, weigh, meta, batches, val, test):
        top = middle_cls(weigh.parameters(), **middle_given)
        for _ in range(2):
            model.load_state_dict(start)
            opt = inner_cls(model.parameters(), **inner_given)
            with mlc.level("inner"):
                for x, y in batches:
                    opt.zero_grad()
                    train_loss(model, weigh, x, y).backward()
                    opt.step()
            top.zero_grad()
            middle_loss(model, meta, val).backward()
            top.step()
        opt = inner_cls(model.parameters(), **inner_given)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, weigh, x, y).backward()
            opt.step()
        return val_loss(model, test)

    def reference(model, start, weigh, meta, batches, val, test):
        top = Learner(weigh)

        def train(learner):
            for x, y in batches:
                learner.renew()
                weights = _bound(weigh, top.params)
                learner.step(inner_cls, learner.grads(train_loss(learner, weights, x, y)), **inner_given)
            return learner

        for _ in range(2):
            learner = train(Learner(model, {n: v.clone().requires_grad_() for n, v in start.items()}))
            top.step(middle_cls, top.grads(middle_loss(learner, meta, val)), **middle_given)
        again = train(Learner(model, learner.params))
        return val_loss(again, test)

    args = {**task("mlp", 2).args(), "start": mlp().state_dict(), "weigh": Meta(), "test": draw("mlp")}
    return Setup(loop, reference, {**args, "meta": nn.Parameter(torch.randn(6))})


class _bound:
    """Meta with given parameter values."""

    def __init__(self, module: Meta, params: dict[str, Tensor]) -> None:
        self.source, self.log_l2 = params["source"], params["log_l2"]

    __call__, penalty = Meta.forward, Meta.penalty


@SUITE.add(referee="reference", eager=False, tolerance=THREE)
def three_levels_of_sgd() -> Setup:
    """Plain PyTorch drops the path through the inner optimizer, so differences are taken of the reference."""
    return nested(SGD, {"lr": 0.1, "momentum": 0.9}, SGD, {"lr": 0.5})


@SUITE.add(referee="reference", eager=False, tolerance=THREE)
def three_levels_of_adam() -> Setup:
    """As above, Adam within Adam."""
    return nested(Adam, {"lr": 0.05, "eps": EPS}, Adam, {"lr": 0.1, "eps": EPS})


@SUITE.add(referee="reference", eager=False, tolerance=THREE)
def three_levels_where_the_middle_goes_in_reverse() -> Setup:
    """The middle loss has no forward rule, so its level falls back, and the one below with it."""
    return nested(Adam, {"lr": 0.05, "eps": EPS}, Adam, {"lr": 0.1, "eps": EPS}, custom=True)
