"""What cannot be traced is an error that names the user's file and line, and says what to write instead.

A loop marks the line to be named with a comment `# <here>`; where several lines are fair to blame (a scaler is
made, used and stepped), all of them are marked and one must be named. A loop without a mark may be blamed
anywhere in its body. `names` is a word that the message must contain, so that it is about the right thing.
"""

import copy
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim import LBFGS, SGD, Adam, Muon, Rprop, SparseAdam

from tests.numerics.models import CLASSES, task, train_loss, val_loss
from tests.numerics.program import describe, same

HERE = Path(__file__).name
ADVICE = re.compile(
    r"\b(use|try|write|instead|move|call|pass|put|replace|remove|make|drop|set|take|return|without|outside)\b"
)


@dataclass(frozen=True)
class Refused:
    """A loop that must be refused, and a word of the message."""

    loop: Callable[..., Any]
    names: str
    model: Callable[[], nn.Module] | None = None

    def lines(self) -> set[int]:
        """Lines of this file that the message may name."""
        source, start = inspect.getsourcelines(self.loop)
        marked = {start + i for i, line in enumerate(source) if "# <here>" in line}
        return marked or set(range(start, start + len(source)))

    def args(self) -> dict[str, Any]:
        args = task().args()
        return {**args, "model": self.model()} if self.model else args


REFUSED: list[Refused] = []


def refused(names: str, model: Callable[[], nn.Module] | None = None) -> Callable:
    """Register a loop as one that must be refused."""

    def keep(loop: Callable) -> Callable:
        REFUSED.append(Refused(loop, names, model))
        return loop

    return keep


def check_message(message: str, lines: set[int], names: str) -> None:
    named = {int(n) for n in re.findall(rf'{HERE}"?(?::|, line )(\d+)', message)}
    assert named, f"no line of {HERE} in: {message}"
    assert named & lines, f"names line {named}, expected one of {sorted(lines)}: {message}"
    assert re.search(names, message, re.IGNORECASE), f"does not say {names!r}: {message}"
    assert ADVICE.search(message.lower()), f"no advice in: {message}"


def step(model, meta, opt, x, y) -> torch.Tensor:
    opt.zero_grad()
    loss = train_loss(model, meta, x, y)
    loss.backward()
    opt.step()
    return loss


# --- values that decide


@refused("value|data|branch")
def a_branch_on_data(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        if loss > 0.5:  # <here>
            opt.param_groups[0]["lr"] = 0.2
    return val_loss(model, val)


@refused("value|data|branch")
def a_while_on_data(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    loss = step(model, meta, opt, *batches[0])
    while loss.item() > 0.1:  # <here>
        loss = step(model, meta, opt, *batches[0])
    return val_loss(model, val)


@refused("value|data|branch")
def a_check_for_nan(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        if not torch.isfinite(loss):  # <here>
            break
    return val_loss(model, val)


@refused("item|value|number")
def an_item_that_is_computed_with(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        loss = train_loss(model, meta, x, y)
        (loss / loss.item()).backward()  # <here>
        opt.step()
    return val_loss(model, val)


@refused("item|value|number|index")
def an_item_that_chooses_an_index(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        row = int(loss.item() * 0)  # <here>
        x[row].add_(1)  # <here>
    return val_loss(model, val)


@refused("item|value|number|python")
def an_item_that_is_returned(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
    return {"loss": val_loss(model, val), "last": 2.0 * loss.item()}  # <here>


@refused("numpy")
def numpy(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        print(loss.detach().numpy())  # <here>
    return val_loss(model, val)


@refused("tolist|value|list")
def tolist(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)
        weights = model(x).softmax(1).sum(0).tolist()  # <here>
        if weights[0] > weights[1]:  # <here>
            opt.zero_grad()
    return val_loss(model, val)


@refused("mask|size|shape|where")
def a_mask_of_unknown_size(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        hard = losses[losses > losses.mean()]  # <here>
        (meta.log_l2.exp() * hard.mean()).backward()
        opt.step()
    return val_loss(model, val)


@refused("nonzero|size|shape|where")
def nonzero(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        chosen = torch.nonzero(model(x)[:, 0] > 0).squeeze(1)  # <here>
        train_loss(model, meta, x[chosen], y[chosen]).backward()
        opt.step()
    return val_loss(model, val)


# --- optimizers


@refused("LBFGS")
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


@refused("Rprop")
def rprop(model, meta, batches, val):
    opt = Rprop(model.parameters(), lr=0.1)  # <here>
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()  # <here>
    return val_loss(model, val)


@refused("Muon")
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
        return self.embed(x[:, 0].abs().long() % 7)  # sparse gradients come from this line


@refused("SparseAdam|sparse", Sparse)
def sparse_adam(model, meta, batches, val):
    opt = SparseAdam(model.parameters(), lr=0.1)  # <here>
    for x, y in batches:
        opt.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")  # <here>
        meta(losses, y).backward()  # <here>
        opt.step()  # <here>
    return val_loss(model, val)


@refused("sparse", Sparse)
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
                if p.grad is not None and p.grad.norm() > 1e-3:
                    p.add_(p.grad, alpha=-group["lr"])


@refused("value|data|branch")
def an_optimizer_that_branches_on_data(model, meta, batches, val):
    opt = MyStep(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()  # <here>
    return val_loss(model, val)


# --- autograd


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


@refused("once_differentiable|Once")
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
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.numpy() * g.numpy())


@refused("numpy|Blind|trace")
def a_function_that_cannot_be_traced(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        out = Blind.apply(model(x))  # <here>
        meta(F.cross_entropy(out, y, reduction="none"), y).backward()  # <here>
        opt.step()
    return val_loss(model, val)


@refused("scalar")
def a_loss_that_is_not_scalar(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        losses = meta.source[y] * F.cross_entropy(model(x), y, reduction="none")
        losses.backward()  # <here>
        opt.step()
    return val_loss(model, val)


@refused("hook")
def tensor_hook(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        out = model(x)
        out.register_hook(lambda g: g * 0.5)  # <here>
        meta(F.cross_entropy(out, y, reduction="none"), y).backward()
        opt.step()
    return val_loss(model, val)


@refused("hook")
def hook_on_a_parameter(model, meta, batches, val):
    model[0].weight.register_hook(lambda g: g.clamp(-1, 1))  # <here>
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)
    return val_loss(model, val)


@refused("hook")
def module_backward_hook(model, meta, batches, val):
    model[0].register_full_backward_hook(lambda module, gi, go: None)  # <here>
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()  # <here>
        opt.step()
    return val_loss(model, val)


@refused("scaler")
def grad_scaler(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")  # <here>
    for x, y in batches:
        opt.zero_grad()
        scaler.scale(train_loss(model, meta, x, y)).backward()  # <here>
        scaler.step(opt)  # <here>
        scaler.update()
    return val_loss(model, val)


@refused(r"\.data|data =|set_data|copy_")
def data_assigned(model, meta, batches, val):
    for x, y in batches:
        model.zero_grad()
        train_loss(model, meta, x, y).backward()
        for p in model.parameters():
            p.data = p.data - 0.1 * p.grad  # <here>
    return val_loss(model, val)


# --- meta-parameters


@refused("meta-parameter")
def no_meta_parameter(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return val_loss(model, val)


@refused("detach|path|stop")
def no_path_because_of_detach(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        weights = torch.sigmoid(meta.source).detach()  # <here>
        (weights[y] * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        opt.step()
    return val_loss(model, val)


@refused("no_grad|path|stop")
def no_path_because_of_no_grad(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        with torch.no_grad():
            weights = torch.sigmoid(meta.source)  # <here>
        (weights[y] * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        opt.step()
    return val_loss(model, val)


@refused("path|detach|stop|output")
def no_path_because_the_result_is_detached(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)
    return val_loss(model, val).detach()  # <here>


@refused("return|output|tensor")
def nothing_returned(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)


@refused("path|meta-parameter")
def no_path_because_nothing_was_stepped(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
    return val_loss(model, val)


# --- the tests


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.loop.__name__)
def test_refused(case: Refused, mlc: ModuleType) -> None:
    args = case.args()
    before = {n: copy.deepcopy(describe(args[n])) for n in ("model", "meta")}
    with pytest.raises(mlc.MlcError) as error:
        mlc.compile(case.loop)(**args)
    check_message(str(error.value), case.lines(), case.names)
    for n, kept in before.items():
        same(describe(args[n]), kept, n)


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
    with pytest.raises(mlc.MlcError, match="(?i)hook"):
        mlc.compile(loop)(**args)


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
    check_message(str(error.value), {line}, "value|data|branch")


def test_refusal_warns_of_nothing(mlc: ModuleType) -> None:
    """An error is enough: no warnings beside it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(mlc.MlcError):
            mlc.compile(a_branch_on_data)(**task().args())
    assert not seen, [str(w.message) for w in seen]
