"""What happens to gradients between `backward()` and the step: clipping and accumulation."""

from types import ModuleType

import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adam

from tests.numerics.models import task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner, clip_norm, clip_value

SUITE = Suite()
EPS = 1e-3


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


def clipped(clip, clip_reference) -> Setup:
    def loop(model, meta, batches, val):
        opt = Adam(model.parameters(), lr=0.05, eps=EPS)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            clip(model.parameters())
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            grads = clip_reference(learner.grads(train_loss(learner, meta, x, y)))
            learner.step(Adam, grads, lr=0.05, eps=EPS)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())


@SUITE.add()
def clip_by_norm() -> Setup:
    return clipped(lambda ps: clip_grad_norm_(ps, 0.05), lambda gs: clip_norm(gs, 0.05))


@SUITE.add()
def clip_by_norm_that_does_not_bind() -> Setup:
    return clipped(lambda ps: clip_grad_norm_(ps, 100.0), lambda gs: gs)


@SUITE.add()
def clip_by_norm_one_by_one() -> Setup:
    return clipped(lambda ps: clip_grad_norm_(ps, 0.05, foreach=False), lambda gs: clip_norm(gs, 0.05))


@SUITE.add(differences=1e-5)
def clip_by_value() -> Setup:
    return clipped(lambda ps: clip_grad_value_(ps, 0.02), lambda gs: clip_value(gs, 0.02))


def accumulated(zero) -> Setup:
    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
        zero(model, opt)
        for i, (x, y) in enumerate(batches):
            (train_loss(model, meta, x, y) / 2).backward()
            if (i + 1) % 2 == 0:
                opt.step()
                zero(model, opt)
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            loss = (train_loss(learner, meta, *first) + train_loss(learner, meta, *second)) / 2
            learner.step(SGD, learner.grads(loss), lr=0.1, momentum=0.9)
        return val_loss(learner, val)

    return Setup(loop, reference, task("mlp", 4).args())


@SUITE.add()
def accumulation() -> Setup:
    return accumulated(lambda model, opt: opt.zero_grad())


@SUITE.add()
def accumulation_zeroed_in_place() -> Setup:
    return accumulated(lambda model, opt: model.zero_grad(set_to_none=False))


@SUITE.add()
def two_backwards_through_one_graph() -> Setup:
    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            out = model(x)
            meta(F.cross_entropy(out, y, reduction="none"), y).backward(retain_graph=True)
            (meta.log_l2.exp() * out.square().mean()).backward(inputs=list(model.parameters()))
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            out = learner(x)
            loss = meta(F.cross_entropy(out, y, reduction="none"), y) + meta.log_l2.exp() * out.square().mean()
            learner.step(SGD, learner.grads(loss), lr=0.1)
        return val_loss(learner, val)

    return Setup(loop, reference, task().args())
