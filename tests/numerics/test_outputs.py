"""Outputs of every structure, each differentiated; meta-parameters found wherever they are."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from tests.numerics.models import Meta, draw, mlp, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference, gradients, same
from tests.numerics.reference import Learner, worst

SUITE = Suite()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


def run(model, meta, batches):
    opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()
    return model


def run_reference(model, meta, batches):
    learner = Learner(model)
    for x, y in batches:
        learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.1, momentum=0.9)
    return learner


def returning(finish) -> Setup:
    def loop(model, meta, batches, val):
        return finish(run(model, meta, batches), meta, val)

    def reference(model, meta, batches, val):
        return finish(run_reference(model, meta, batches), meta, val)

    return Setup(loop, reference, task().args())


def two(model, meta, val) -> tuple[Tensor, Tensor]:
    return val_loss(model, val), model(val[0]).square().mean() + meta.log_l2.square()


def named(model, meta, val) -> dict:
    first, second = two(model, meta, val)
    return {"loss": first, "size": second, "steps": 3, "name": "run"}


@SUITE.add()
def pair() -> Setup:
    return returning(two)


@SUITE.add()
def dictionary_with_other_things() -> Setup:
    return returning(named)


@SUITE.add()
def nested_list() -> Setup:
    return returning(lambda model, meta, val: [val_loss(model, val), meta.source.sum()])


@SUITE.add()
def losses_that_are_not_summed() -> Setup:
    """An output of any shape; which cotangent it gets is the caller's business."""
    return returning(lambda m, meta, val: F.cross_entropy(m(val[0]), val[1], reduction="none"))


@SUITE.add()
def losses_along_the_way() -> Setup:
    """The outer loss is the sum of validation losses after each step."""

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        total = 0.0
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
            total = total + val_loss(model, val)
        return total / len(batches)

    def reference(model, meta, batches, val):
        learner, total = Learner(model), 0.0
        for x, y in batches:
            learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.1)
            total = total + val_loss(learner, val)
        return total / len(batches)

    return Setup(loop, reference, task().args())


@SUITE.add()
def everything_in_the_closure() -> Setup:
    args = task().args()
    model, meta, batches, val = args.values()

    def loop():
        return val_loss(run(model, meta, batches), val)

    def reference():
        return val_loss(run_reference(model, meta, batches), val)

    return Setup(loop, reference, {}, dict(meta.named_parameters()))


class Trainer:
    """A loop that is a method: its tensors hang on an object."""

    def __init__(self) -> None:
        self.model, self.weigh = mlp(), {"net": Meta()}
        self.batches = [draw("mlp") for _ in range(3)]

    def train(self, val: tuple[Tensor, Tensor], runner) -> Tensor:
        return val_loss(runner(self.model, self.weigh["net"], self.batches), val)


@SUITE.add()
def a_method() -> Setup:
    trainer = Trainer()

    def loop(val):
        return trainer.train(val, run)

    def reference(val):
        return trainer.train(val, run_reference)

    return Setup(loop, reference, {"val": draw("mlp")}, dict(trainer.weigh["net"].named_parameters()))


@SUITE.add()
def meta_parameters_in_both_losses() -> Setup:
    """A direct gradient of the outer loss beside the one through the training."""
    return returning(lambda m, meta, val: meta(F.cross_entropy(m(val[0]), val[1], reduction="none"), val[1]))


def pieces(mlc: ModuleType | None) -> tuple[dict, Tensor, Tensor]:
    setup = Program(pair).fresh()
    fn = setup.reference if mlc is None else mlc.compile(setup.loop)
    return (setup.meta, *fn(**setup.args))


def test_each_of_two_outputs_alone(mlc: ModuleType) -> None:
    for index in (0, 1):
        meta, *outs = pieces(mlc)
        expected_meta, *expected = pieces(None)
        error, name = worst(gradients(outs[index], meta), gradients(expected[index], expected_meta))
        assert error <= 1e-9, f"output {index}, {name}"


def test_two_outputs_one_after_the_other(mlc: ModuleType) -> None:
    meta, first, second = pieces(mlc)
    expected_meta, *expected = pieces(None)
    one = torch.autograd.grad(first, list(meta.values()), retain_graph=True, allow_unused=True)
    two_ = torch.autograd.grad(second, list(meta.values()), allow_unused=True)
    for got, want in ((one, expected[0]), (two_, expected[1])):
        wanted = torch.autograd.grad(want, list(expected_meta.values()), retain_graph=True)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_batch_of_cotangents_one_by_one(mlc: ModuleType) -> None:
    program = Program(losses_that_are_not_summed)
    setup, other = program.fresh(), program.fresh()
    out = mlc.compile(setup.loop)(**setup.args)
    want = other.reference(**other.args)
    cotangent = torch.randn(out.shape)
    got = torch.autograd.grad(out, list(setup.meta.values()), cotangent)
    wanted = torch.autograd.grad(want, list(other.meta.values()), cotangent)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_structure_is_kept(mlc: ModuleType) -> None:
    setup = Program(dictionary_with_other_things).fresh()
    out = mlc.compile(setup.loop)(**setup.args)
    assert type(out) is dict and list(out) == ["loss", "size", "steps", "name"]
    assert out["steps"] == 3 and out["name"] == "run"
    listed = Program(nested_list).fresh()
    assert type(mlc.compile(listed.loop)(**listed.args)) is list


def test_the_decorator_keeps_the_function_s_name(mlc: ModuleType) -> None:
    @mlc.compile(memory="2GiB")
    def train(model, meta, batches, val):
        """Doc."""
        return val_loss(run(model, meta, batches), val)

    assert train.__name__ == "train" and train.__doc__ == "Doc."
    args = task().args()
    train(**args).backward()
    assert args["meta"].source.grad is not None


def test_frozen_outputs_do_not_require_grad(mlc: ModuleType) -> None:
    def loop(model, meta, batches, val):
        run(model, meta, batches)
        with torch.no_grad():
            plain = val_loss(model, val)
        return val_loss(model, val), plain

    args = task().args()
    loss, plain = mlc.compile(loop)(**args)
    assert loss.requires_grad and not plain.requires_grad
    same(loss.detach(), plain, "loss")


def test_an_output_that_is_the_trained_model_s_weights(mlc: ModuleType) -> None:
    """Trained parameters returned as tensors are functions of the meta-parameters."""

    def weights(model: nn.Module | Learner) -> Tensor:
        return torch.cat([p.reshape(-1) for p in model.parameters()])

    def finish(model, meta, val):
        return weights(model)

    program = Program(lambda: returning(finish))
    setup, other = program.fresh(), program.fresh()
    out = mlc.compile(setup.loop)(**setup.args)
    want = other.reference(**other.args)
    cotangent = torch.randn(want.shape)
    got = torch.autograd.grad(out, list(setup.meta.values()), cotangent)
    wanted = torch.autograd.grad(want, list(other.meta.values()), cotangent)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
