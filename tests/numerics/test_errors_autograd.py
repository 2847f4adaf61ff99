"""What cannot be differentiated is an error with file and line: hooks, Functions, writes, missing paths."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.optim import SGD

from tests.numerics.models import train_loss, val_loss
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


@REFUSED.add("hook.*result")
def a_hook_on_the_way_to_the_result(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)
    out = model(val[0])
    out.register_hook(lambda g: g * 0.5)  # <here>
    return F.cross_entropy(out, val[1])


@REFUSED.add("hook.*result")
def a_hook_of_a_module_that_changes_the_gradient(model, meta, batches, val):
    model[2].register_full_backward_hook(lambda module, gi, go: (2 * gi[0],))
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)
    return val_loss(model, val)  # <here>


@REFUSED.add("hook.*after a gradient")
def a_hook_between_two_gradients(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        out = model(x)
        loss = meta(F.cross_entropy(out, y, reduction="none"), y)
        loss.backward(retain_graph=True)
        out.register_hook(lambda g: g * 0.5)  # <here>
        loss.backward()
        opt.step()
    return val_loss(model, val)


@REFUSED.add("hook.*view")
def a_hook_on_a_view_in_use(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        out = model(x).t()
        more = out.square().mean()
        out.register_hook(lambda g: g * 0.5)  # <here>
        (more + meta(F.cross_entropy(out.t(), y, reduction="none"), y)).backward()
        opt.step()
    return val_loss(model, val)


@REFUSED.add("hook.*in place")
def a_hook_that_writes_what_others_see(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        one, two = model(x), model(2 * x)
        for out in (one, two):
            out.register_hook(lambda g: g.mul_(0.5))  # <here>
        meta(F.cross_entropy(one + two, y, reduction="none"), y).backward()  # <here>
        opt.step()
    return val_loss(model, val)


@REFUSED.add("hook.*node")
def a_hook_on_a_node(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        out, seen = model(x), []
        out.grad_fn.register_prehook(lambda grads, s=seen: s.append(grads[0]))  # <here>
        meta(F.cross_entropy(out, y, reduction="none"), y).backward()
        opt.step()
    return val_loss(model, val) + seen[0].sum()


@REFUSED.add("hook.*old kind")
def a_hook_of_the_old_kind(model, meta, batches, val):
    model[0].register_backward_hook(lambda module, gi, go: None)
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()  # <here>
        opt.step()
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
