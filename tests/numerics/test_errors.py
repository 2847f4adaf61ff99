"""What cannot be traced is an error with file and line: values that decide, sizes, optimizers."""

import inspect
import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD, Muon, Rprop, SparseAdam

from tests.numerics.models import CLASSES, Meta, draw, mlp, task, train_loss, val_loss
from tests.numerics.program import gradients
from tests.numerics.reference import Learner, worst
from tests.numerics.refusals import Refusals, Refused, check_message, check_refused, step

REFUSED = Refusals()


def test_refused(refused: Refused, mlc: ModuleType) -> None:
    check_refused(refused, mlc)


# --- what PyTorch itself refuses, but not for tensors without values


@REFUSED.add("dtype")
def a_model_in_another_precision(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        F.cross_entropy(model(x.float()), y).backward()  # <here>
        opt.step()
    return val_loss(model, val)


@REFUSED.add("dtype")
def an_update_in_another_precision(model, meta, batches, val):
    w = model[0].weight.detach().clone().requires_grad_()
    x, y = batches[0]
    loss = meta(F.cross_entropy(model(x), y, reduction="none"), y)
    (g,) = torch.autograd.grad(loss, model[0].weight, create_graph=True)
    return loss + torch.baddbmm(w[None], g[None].float(), torch.eye(4)[None]).sum()  # <here>


# --- values that decide


@REFUSED.add("value|data|branch")
def a_branch_on_data(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        if loss > 0.5:  # <here>
            opt.param_groups[0]["lr"] = 0.2
    return val_loss(model, val)


@REFUSED.add("value|data|branch")
def a_while_on_data(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    loss = step(model, meta, opt, *batches[0])
    while loss.item() > 0.1:  # <here>
        loss = step(model, meta, opt, *batches[0])
    return val_loss(model, val)


@REFUSED.add("value|data|branch")
def a_check_for_nan(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        if not torch.isfinite(loss):  # <here>
            break
    return val_loss(model, val)


@REFUSED.add("item|value|number|index")
def an_item_that_chooses_an_index(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        row = int(loss.item() * 0)  # <here>
        x[row].add_(1)  # <here>
    return val_loss(model, val)


@REFUSED.add("numpy")
def numpy(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        print(loss.detach().numpy())  # <here>
    return val_loss(model, val)


@REFUSED.add("tolist|value|list")
def tolist(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)
        weights = model(x).softmax(1).sum(0).tolist()  # <here>
        if weights[0] > weights[1]:  # <here>
            opt.zero_grad()
    return val_loss(model, val)


@REFUSED.add("mask|size|shape|where")
def a_mask_of_unknown_size(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        hard = losses[losses > losses.mean()]  # <here>
        (meta.log_l2.exp() * hard.mean()).backward()
        opt.step()
    return val_loss(model, val)


@REFUSED.add("nonzero|size|shape|where")
def nonzero(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        chosen = torch.nonzero(model(x)[:, 0] > 0).squeeze(1)  # <here>
        train_loss(model, meta, x[chosen], y[chosen]).backward()
        opt.step()
    return val_loss(model, val)


# --- optimizers


@REFUSED.add("LBFGS")
def lbfgs(model, meta, batches, val):
    opt = LBFGS(model.parameters(), lr=0.1)  # <here>
    for x, y in batches:

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = train_loss(model, meta, x, y)
            loss.backward()
            return loss

        opt.step(closure)  # <here>
    return val_loss(model, val)


@REFUSED.add("Rprop")
def rprop(model, meta, batches, val):
    opt = Rprop(model.parameters(), lr=0.1)  # <here>
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()  # <here>
    return val_loss(model, val)


@REFUSED.add("Muon")
def muon(model, meta, batches, val):
    opt = Muon([p for p in model.parameters() if p.dim() == 2], lr=0.1)  # <here>
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


class MyStep(torch.optim.Optimizer):
    """An optimizer that somebody wrote, whose step needs a number."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.norm() > 1e-3:  # <here>
                    p.add_(p.grad, alpha=-group["lr"])


@REFUSED.add("value|data|branch", MyStep)
def an_optimizer_that_branches_on_data(model, meta, batches, val):
    opt = MyStep(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()  # <here>
    return val_loss(model, val)


# --- numbers taken out of tensors: refused, or right at every call


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
        try:
            out = function(model, meta, batches, val)
        except mlc.MlcError as error:
            check_message(str(error), "test_errors.py", Refused(scaled, "").lines(), "item|value|number")
            return
        assert out["last"] == pytest.approx(last, rel=1e-10)
        error, name = worst(gradients(out["loss"], params), gradients(loss, params))
        assert error <= 1e-9, name


# --- where the message points


def test_an_error_in_a_helper_names_the_helper_s_line(mlc: ModuleType) -> None:
    """The innermost line of the user's own code is the one to look at."""

    def helper(loss):
        return 0.1 if loss > 0.5 else 0.2  # <helper>

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.param_groups[0]["lr"] = helper(step(model, meta, opt, x, y))
        return val_loss(model, val)

    source, start = inspect.getsourcelines(helper)
    line = next(start + i for i, text in enumerate(source) if "# <helper>" in text)
    with pytest.raises(mlc.CaptureError) as error:
        mlc.compile(loop)(**task().args())
    check_message(str(error.value), "test_errors.py", {line}, "value|data|branch")


def test_refusal_warns_of_nothing(mlc: ModuleType) -> None:
    """An error is enough: no warnings beside it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(mlc.MlcError):
            mlc.compile(a_branch_on_data)(**task().args())
    assert not seen, [str(w.message) for w in seen]
