"""What cannot be differentiated is an error with file and line: hooks, Functions, writes, missing paths."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.optim import SGD, Adam

from tests.numerics.models import task, train_loss, val_loss
from tests.numerics.refusals import Refusals, Refused, check_refused, step

REFUSED = Refusals()


def test_refused(refused: Refused, mlc: ModuleType) -> None:
    check_refused(refused, mlc)


# --- autograd


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x  # <here>

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g  # <here>


@REFUSED.add("once_differentiable|Once", Once)
def once_differentiable_function(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        out = Once.apply(model(x))  # <here>
        meta(F.cross_entropy(out, y, reduction="none"), y).backward()  # <here>
        opt.step()
    return val_loss(model, val)


class Blind(torch.autograd.Function):
    """The backward leaves PyTorch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x  # <here>

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.numpy() * g.numpy())  # <here>


@REFUSED.add("numpy|Blind|trace", Blind)
def a_function_that_cannot_be_traced(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        out = Blind.apply(model(x))  # <here>
        meta(F.cross_entropy(out, y, reduction="none"), y).backward()  # <here>
        opt.step()
    return val_loss(model, val)


@REFUSED.add("hook")
def tensor_hook(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        out = model(x)
        out.register_hook(lambda g: g * 0.5)  # <here>
        meta(F.cross_entropy(out, y, reduction="none"), y).backward()
        opt.step()
    return val_loss(model, val)


@REFUSED.add("hook")
def hook_on_a_parameter(model, meta, batches, val):
    model[0].weight.register_hook(lambda g: g.clamp(-1, 1))  # <here>
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)
    return val_loss(model, val)


@REFUSED.add("hook")
def module_backward_hook(model, meta, batches, val):
    model[0].register_full_backward_hook(lambda module, gi, go: None)  # <here>
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()  # <here>
        opt.step()
    return val_loss(model, val)


@REFUSED.add("scaler")
def grad_scaler(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")  # <here>
    for x, y in batches:
        opt.zero_grad()
        scaler.scale(train_loss(model, meta, x, y)).backward()  # <here>
        scaler.step(opt)  # <here>
        scaler.update()
    return val_loss(model, val)


# --- meta-parameters


@REFUSED.add("meta-parameter")
def no_meta_parameter(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return val_loss(model, val)


@REFUSED.add("detach|path|stop")
def no_path_because_of_detach(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        weights = torch.sigmoid(meta.source).detach()  # <here>
        (weights[y] * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        opt.step()
    return val_loss(model, val)


@REFUSED.add("no_grad|path|stop")
def no_path_because_of_no_grad(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        with torch.no_grad():
            weights = torch.sigmoid(meta.source)  # <here>
        (weights[y] * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        opt.step()
    return val_loss(model, val)


@REFUSED.add("path|detach|stop|output")
def no_path_because_the_result_is_detached(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)
    return val_loss(model, val).detach()  # <here>


@REFUSED.add("return|output|tensor")
def nothing_returned(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)


@pytest.mark.parametrize("kind", ["tensor", "module"])
def test_hooks_from_before_the_call(kind: str, mlc: ModuleType) -> None:
    """Registered outside: some line of the loop is named, and the hook."""

    def loop(model, meta, batches, val):
        opt = Adam(model.parameters(), lr=0.1)
        for x, y in batches:
            step(model, meta, opt, x, y)
        return val_loss(model, val)

    args = task().args()
    if kind == "tensor":
        args["model"][0].weight.register_hook(lambda g: 2 * g)
    else:
        args["model"][0].register_full_backward_hook(lambda module, gi, go: None)
    with pytest.raises(mlc.MlcError, match=r"(?i)hook"):
        mlc.compile(loop)(**args)
