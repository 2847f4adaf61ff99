"""Loops around loops over iterables: epochs, rounds of epochs, an iterator anew in every step."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from mlc.ir.core import Loop, Region
from tests.numerics.models import Task, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner

SUITE = Suite()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


def step(model, meta, opt, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    train_loss(model, meta, x, y).backward()
    opt.step()


def learner_step(learner, meta, x: Tensor, y: Tensor) -> None:
    learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.1, momentum=0.9)


def loader(given: Task) -> DataLoader:
    pairs = TensorDataset(*[torch.cat(parts) for parts in zip(*given.batches, strict=True)])
    return DataLoader(pairs, batch_size=len(given.batches[0][0]), shuffle=True)


def epochs(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for x, y in batches:
            step(model, meta, opt, x, y)
    return val_loss(model, val)


def epochs_reference(model, meta, batches, val):
    learner = Learner(model)
    for _ in range(3):
        for x, y in batches:
            learner_step(learner, meta, x, y)
    return val_loss(learner, val)


@SUITE.add()
def over_a_list() -> Setup:
    return Setup(epochs, epochs_reference, task("mlp", 3).args())


@SUITE.add()
def over_a_shuffled_loader() -> Setup:
    given = task("mlp", 3)
    return Setup(epochs, epochs_reference, {**given.args(), "batches": loader(given)})


def rounds(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
    total = torch.zeros(())
    for _ in range(2):
        for _ in range(2):
            for i, (x, y) in enumerate(batches):
                step(model, meta, opt, x * (1 + 0.1 * i), y)
        total = total + val_loss(model, val)
    return total


def rounds_reference(model, meta, batches, val):
    learner = Learner(model)
    total = torch.zeros(())
    for _ in range(2):
        for _ in range(2):
            for i, (x, y) in enumerate(batches):
                learner_step(learner, meta, x * (1 + 0.1 * i), y)
        total = total + val_loss(learner, val)
    return total


@SUITE.add(eager=False)
def rounds_of_epochs() -> Setup:
    """The result reads the model in the middle of training."""
    return Setup(rounds, rounds_reference, task("mlp", 2).args())


def firsts(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        x, y = next(iter(batches))
        step(model, meta, opt, x, y)
    return val_loss(model, val)


def firsts_reference(model, meta, batches, val):
    learner = Learner(model)
    for _ in range(4):
        x, y = next(iter(batches))
        learner_step(learner, meta, x, y)
    return val_loss(learner, val)


@SUITE.add()
def first_of_a_new_iterator() -> Setup:
    given = task("mlp", 3)
    return Setup(firsts, firsts_reference, {**given.args(), "batches": loader(given)})


# --- how they roll


def nesting(region: Region) -> list[tuple[int | None, list]]:
    return [(e.op.trips, nesting(e.op.body)) for e in region.eqns if isinstance(e.op, Loop)]


@pytest.mark.parametrize(
    ("loop", "shape"),
    [
        (epochs, [(3, [(5, [])])]),
        (firsts, [(4, [])]),
    ],
    ids=["epochs", "firsts"],
)
def test_every_loop_rolls(loop, shape, mlc: ModuleType) -> None:
    program = mlc.trace(loop, **task("mlp", 5).args())
    assert nesting(program.region) == shape
    assert program.notes == ()


def test_state_made_in_the_first_step(mlc: ModuleType) -> None:
    """Values read behind the last epoch (gradients, a batch) leave every epoch alike."""

    def loop(model, meta, batches, val):
        opt = Adam(model.parameters(), lr=0.1, eps=1e-3)
        for _ in range(3):
            for x, y in batches:
                step(model, meta, opt, x, y)
        return val_loss(model, val) + val_loss(model, (x, y))

    program = mlc.trace(loop, **task("mlp", 5).args())
    assert nesting(program.region) == [(3, [(5, [])])]


def fresh(steps: int, scale: float = 1.0) -> dict:
    torch.manual_seed(0)
    args = task("mlp", steps).args()
    return args | {"batches": [(x * scale, y) for x, y in args["batches"]]}


def test_new_data_at_every_call(mlc: ModuleType) -> None:
    """Each epoch of a later call draws from the iterable of that call, without another trace."""
    compiled = mlc.compile(epochs)
    compiled(**fresh(3))
    first = compiled.program
    value = compiled(**fresh(3, scale=1.5))
    torch.testing.assert_close(value, epochs(**fresh(3, scale=1.5)), rtol=1e-12, atol=0)
    assert compiled.program is first


def test_more_data_in_an_epoch(mlc: ModuleType) -> None:
    compiled = mlc.compile(epochs)
    compiled(**fresh(3))
    value = compiled(**fresh(4))
    torch.testing.assert_close(value, epochs(**fresh(4)), rtol=1e-12, atol=0)
