"""What cannot be traced is an error with file and line; what PyTorch itself refuses is its own error."""

import copy
import inspect
import warnings
from types import ModuleType

import pytest
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, SparseAdam

from tests.numerics.models import CLASSES, Meta, draw, mlp, task, train_loss, val_loss
from tests.numerics.program import describe, gradients, same
from tests.numerics.reference import Learner, worst
from tests.numerics.refusals import Refusals, Refused, check_message, check_refused

REFUSED = Refusals()


def test_refused(refused: Refused, mlc: ModuleType) -> None:
    check_refused(refused, mlc)


# --- optimizers


@REFUSED.add("SparseAdam")
def for_sparse_gradients(model, meta, batches, val):
    opt = SparseAdam(model.parameters(), lr=0.1)  # <here>
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()  # <here>
    return val_loss(model, val)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, CLASSES, sparse=True)

    def forward(self, x):
        return self.embed(x[:, 0].abs().long() % 7)  # <here>


@REFUSED.add("SparseAdam|sparse", Sparse, model=Sparse)
def sparse_adam(model, meta, batches, val):
    opt = SparseAdam(model.parameters(), lr=0.1)  # <here>
    for x, y in batches:
        opt.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")  # <here>
        meta(losses, y).backward()  # <here>
        opt.step()  # <here>
    return val_loss(model, val)


@REFUSED.add(r"sparse gradient|sparse=|sparse embedding", Sparse, model=Sparse)
def sparse_gradients(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")  # <here>
        meta(losses, y).backward()  # <here>
        opt.step()  # <here>
    return val_loss(model, val)


# --- what PyTorch itself refuses


def another_precision(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for i, (x, y) in enumerate(batches):
        opt.zero_grad()
        F.cross_entropy(model(x.float() if i else x), y).backward()
        opt.step()
    return val_loss(model, val)


def no_scalar(model, meta, batches, val):
    for x, y in batches:
        (meta.source[y] * F.cross_entropy(model(x), y, reduction="none")).backward()
    return val_loss(model, val)


@pytest.mark.parametrize("loop", [another_precision, no_scalar])
def test_an_error_of_eager_pytorch_is_its_own(loop, mlc: ModuleType) -> None:
    """The first call is the loop: what it raises is raised, and everything is as it was before."""
    args = task().args()
    before = {n: copy.deepcopy(describe(args[n])) for n in ("model", "meta")}
    with pytest.raises(RuntimeError) as plain:
        loop(**copy.deepcopy(args))
    with pytest.raises(RuntimeError) as compiled:
        mlc.compile(loop)(**args)
    assert str(compiled.value) == str(plain.value)
    for n, kept in before.items():
        same(describe(args[n]), kept, n)


# --- numbers taken out of tensors: right at every call


def scaled(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        loss = train_loss(model, meta, x, y)
        (loss / loss.item()).backward()  # <here>
        opt.step()
    return {"loss": val_loss(model, val), "last": 2.0 * loss.item()}  # <here>


def scaled_reference(model, meta, batches, val):
    learner = Learner(model)
    for x, y in batches:
        loss = train_loss(learner, meta, x, y)
        learner.step(SGD, learner.grads(loss / loss.detach()), lr=0.1)
    return val_loss(learner, val), 2.0 * float(loss.detach())


def test_an_item_that_is_computed_with(mlc: ModuleType) -> None:
    function, model, meta = mlc.compile(scaled), mlp(), Meta()
    params = dict(meta.named_parameters())
    for _ in range(3):
        batches, val = [draw("mlp") for _ in range(3)], draw("mlp")
        loss, last = scaled_reference(model, meta, batches, val)
        out = function(model, meta, batches, val)
        assert out["last"] == pytest.approx(last, rel=1e-10)
        error, name = worst(gradients(out["loss"], params), gradients(loss, params))
        assert error <= 1e-9, name


# --- where the message points


def test_an_error_in_a_helper_names_the_helper_s_line(mlc: ModuleType) -> None:
    """The innermost line of the user's own code is the one to look at."""

    def helper(opt, loss):
        opt.zero_grad()
        loss.backward()
        opt.step()  # <helper>

    def loop(model, meta, batches, val):
        opt = SparseAdam(model.parameters(), lr=0.1)
        for x, y in batches:
            helper(opt, train_loss(model, meta, x, y))
        return val_loss(model, val)

    source, start = inspect.getsourcelines(helper)
    line = next(start + i for i, text in enumerate(source) if "# <helper>" in text)
    with pytest.raises(mlc.CaptureError) as error:
        mlc.compile(loop)(**task().args())
    check_message(str(error.value), "test_errors.py", {line}, "SparseAdam")


def test_refusal_warns_of_nothing(mlc: ModuleType) -> None:
    """An error is enough: no warnings beside it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(mlc.MlcError):
            mlc.compile(for_sparse_gradients)(**task().args())
    assert not seen, [str(w.message) for w in seen]
