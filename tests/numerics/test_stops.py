"""Where the gradient stops: `detach`, `no_grad` and `.data` cut what a tracked operation reads.

Writes into a trained leaf are updates and never cut; gradients are differentiable whether or not a graph of
them was asked for.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from tests.numerics.models import mlp, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference, gradients
from tests.numerics.reference import Learner, worst

SUITE = Suite()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


def stepping(loss_of, finish=val_loss, reference_loss=None) -> Setup:
    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x, y in batches:
            opt.zero_grad()
            loss_of(model, meta, x, y).backward()
            opt.step()
        return finish(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            loss = (reference_loss or loss_of)(learner, meta, x, y)
            learner.step(SGD, learner.grads(loss), lr=0.1, momentum=0.9)
        return finish(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add(referee="none")
def one_path_of_two_is_cut() -> Setup:
    """The normaliser of the weights is held constant; differences would move it."""

    def loss_of(model, meta, x, y):
        w = torch.sigmoid(meta.source)[y]
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (w / w.sum().detach() * losses).sum() + meta.penalty(model.parameters())

    return stepping(loss_of)


@SUITE.add(referee="none")
def a_value_made_under_no_grad_is_cut() -> Setup:
    """A self-made target: constant for the inner and for the outer gradient."""

    def loss_of(model, meta, x, y):
        with torch.no_grad():
            target = torch.softmax(2 * model(x), 1)
        return train_loss(model, meta, x, y) + F.kl_div(model(x).log_softmax(1), target, reduction="batchmean")

    return stepping(loss_of)


@SUITE.add(referee="none")
def data_is_cut() -> Setup:
    """`.data` of a parameter read in a loss is a constant of it."""

    def loss_of(model, meta, x, y):
        near = sum((p - 0.9 * p.data).square().sum() for p in model.parameters())
        return train_loss(model, meta, x, y) + near

    return stepping(loss_of)


@SUITE.add(referee="none")
def an_early_stop_of_the_unroll() -> Setup:
    """Weights detached in the middle: only the later steps are differentiated (truncation by hand)."""

    def loop(a, b, meta):
        w = torch.zeros(3, requires_grad=True)
        for t in range(4):
            if t == 2:
                w = w.detach().requires_grad_()
            loss = (torch.sigmoid(meta) * (torch.tanh(a @ w) - b).square()).mean()
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            w = w - 0.5 * g
        return (torch.tanh(a @ w) - b).square().mean()

    return Setup(loop, loop, {"a": torch.randn(6, 3), "b": torch.randn(6), "meta": nn.Parameter(torch.randn(6))})


@SUITE.add(referee="none")
def first_order_maml() -> Setup:
    """Gradients detached on purpose: first order is what was written."""

    def loop(meta, batches, val):
        fast = list(meta.parameters())
        for x, y in batches:
            loss = F.cross_entropy(forward(fast, x), y)
            grads = torch.autograd.grad(loss, fast, create_graph=True)
            fast = [p - 0.3 * g.detach() for p, g in zip(fast, grads, strict=True)]
        return F.cross_entropy(forward(fast, val[0]), val[1])

    def forward(w, x):
        return F.linear(torch.tanh(F.linear(x, w[0], w[1])), w[2], w[3])

    given = task()
    return Setup(loop, loop, {"meta": mlp(), "batches": given.batches, "val": given.val})


@SUITE.add()
def metrics_are_not_part_of_the_gradient() -> Setup:
    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        seen = []
        for x, y in batches:
            opt.zero_grad()
            loss = train_loss(model, meta, x, y)
            loss.backward()
            opt.step()
            seen.append(loss.detach())
        with torch.no_grad():
            accuracy = (model(val[0]).argmax(1) == val[1]).double().mean()
        return {"loss": val_loss(model, val), "seen": torch.stack(seen), "accuracy": accuracy}

    def reference(model, meta, batches, val):
        learner, seen = Learner(model), []
        for x, y in batches:
            loss = train_loss(learner, meta, x, y)
            learner.step(SGD, learner.grads(loss), lr=0.1)
            seen.append(loss.detach())
        return {"loss": val_loss(learner, val), "seen": torch.stack(seen)}

    return Setup(loop, reference, task().args())


# --- stop_gradient="inner": a detach stops the gradient of the level that it stands in, and no other


def self_distillation() -> Setup:
    """The target depends on model and teacher; differences see both, and so must the outer gradient."""

    def target_of(model, meta, x):
        return torch.softmax(model(x) + meta(x), 1)

    def loss_of(model, target, x):
        return F.kl_div(model(x).log_softmax(1), target, reduction="batchmean")

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.5)
        for x, _ in batches:
            opt.zero_grad()
            loss_of(model, target_of(model, meta, x).detach(), x).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, _ in batches:
            alias = Learner(model, {n: p.view_as(p) for n, p in learner.params.items()})
            learner.step(SGD, alias.grads(loss_of(alias, target_of(learner, meta, x), x)), lr=0.5)
        return val_loss(learner, val)

    return Setup(loop, reference, {**task().args(), "meta": mlp()})


INNER = Program(self_distillation)


def test_reference_of_inner_stops() -> None:
    check_reference(INNER)


def test_inner_stops(mlc: ModuleType) -> None:
    setup, other = INNER.fresh(), INNER.fresh()
    loss = mlc.compile(setup.loop, stop_gradient="inner")(**setup.args)
    expected = gradients(other.reference(**other.args), other.meta)
    error, name = worst(gradients(loss, setup.meta), expected)
    assert error <= 1e-9, name


def test_a_path_that_is_cut_is_told_with_its_line(mlc: ModuleType) -> None:
    """Section 1.2: cutting one of several paths is no error, and the explanation names the line."""
    setup = one_path_of_two_is_cut()
    compiled = mlc.compile(setup.loop)
    compiled(**setup.args)
    with open(__file__) as file:
        cut = next(i for i, line in enumerate(file, start=1) if "w.sum().detach()" in line)
    assert f"{cut}" in compiled.plan.explain() and "test_stops.py" in compiled.plan.explain()
