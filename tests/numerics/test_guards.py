"""Values that decide: the first call takes the branch that it takes, later ones only where they take it too."""

import copy
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

import mlc
from tests.numerics.models import draw, task, train_loss, val_loss
from tests.numerics.program import describe, same
from tests.numerics.reference import directional
from tests.numerics.refusals import step

LOOPS: dict[str, Callable[..., Any]] = {}


def loop(fn: Callable[..., Any]) -> Callable[..., Any]:
    LOOPS[fn.__name__] = fn
    return fn


@loop
def a_branch_on_data(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        if loss > 1.0:
            opt.param_groups[0]["lr"] = 0.2
    return val_loss(model, val)


@loop
def early_stopping(model, meta, batches, val):
    opt, best, steps = SGD(model.parameters(), lr=0.5), math.inf, 0
    while steps < 6:
        loss = step(model, meta, opt, *batches[steps % 3])
        steps += 1
        if loss.item() > best:
            break
        best = loss.item()
    return val_loss(model, val), steps


@loop
def a_check_for_nan(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        if not torch.isfinite(loss):
            break
    return val_loss(model, val)


@loop
def an_item_that_chooses_an_index(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        row = int(loss.item() * 3) % 4
        opt.zero_grad()
        train_loss(model, meta, x[row : row + 2], y[row : row + 2]).backward()
        opt.step()
    return val_loss(model, val)


@loop
def numbers_of_a_list(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        step(model, meta, opt, x, y)
        weights = model(x).softmax(1).sum(0).tolist()
        if weights[0] > weights[1]:
            opt.param_groups[0]["lr"] *= 0.5
    return val_loss(model, val)


@loop
def a_mask_of_unknown_size(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none") * meta.source[y]
        losses[losses > losses.mean()].mean().backward()
        opt.step()
    return val_loss(model, val)


@loop
def places_that_are_chosen(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        chosen = torch.nonzero(model(x)[:, 0] > -10).squeeze(1)
        train_loss(model, meta, x[chosen], y[chosen]).backward()
        opt.step()
    return val_loss(model, val)


@loop
def a_rate_from_a_loss(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        loss = step(model, meta, opt, x, y)
        opt.param_groups[0]["lr"] = 0.1 * min(1.0, round(loss.item(), 2))
    return val_loss(model, val)


class Careful(torch.optim.Optimizer):
    """An optimizer that somebody wrote, whose step asks a tensor."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.norm() > 1e-3:
                    p.add_(p.grad, alpha=-group["lr"])


@loop
def an_optimizer_that_branches(model, meta, batches, val):
    opt = Careful(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()
    return val_loss(model, val)


def value(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def fresh(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    args = task().args()
    args["batches"], args["val"] = [draw("mlp") for _ in range(3)], draw("mlp")
    return args


@pytest.mark.parametrize("name", LOOPS)
def test_every_call_is_the_loop(name: str, mlc: ModuleType) -> None:
    fn = LOOPS[name]
    compiled = mlc.compile(fn)
    for seed in (1, 2, 3):
        args = fresh(seed)
        plain = copy.deepcopy(args)
        expected, found = fn(**plain), compiled(**args)
        same(describe(found), describe(expected), name, 1e-9)
        same(describe(args["model"]), describe(plain["model"]), "model", 1e-9)
        if name == "a_rate_from_a_loss":
            continue  # rounding makes differences useless
        params = list(args["meta"].parameters())
        found = torch.autograd.grad(value(found), params, allow_unused=True)
        generator = torch.Generator().manual_seed(seed)
        along = [torch.randn(p.shape, generator=generator) for p in params]
        slope = sum(float((g * d).sum()) for g, d in zip(found, along, strict=True) if g is not None)

        def moved(h: float, fn: Any = fn, seed: int = seed, along: list[Tensor] = along) -> float:
            args = fresh(seed)
            with torch.no_grad():
                for p, d in zip(args["meta"].parameters(), along, strict=True):
                    p.add_(d, alpha=h)
            return float(value(fn(**args)).detach())

        measured, spread = directional(moved)
        assert slope == pytest.approx(measured, rel=2e-5, abs=1e-8), f"spread {spread:.1e}"


def test_a_guard_that_holds_needs_no_other_recording(mlc: ModuleType) -> None:
    compiled = mlc.compile(a_check_for_nan)
    for seed in (1, 2, 3):
        compiled(**fresh(seed))
    assert compiled.recordings == 1


def coin(w: Tensor) -> Tensor:
    """A branch by a number that the loop draws."""
    p = torch.ones(2).requires_grad_()
    for _ in range(4):
        rate = 0.1 if torch.rand(()) > 0.5 else 0.2
        (g,) = torch.autograd.grad((w * p.square()).sum(), p)
        with torch.no_grad():
            p -= rate * g
    return p.sum()


def test_guards_are_listed_with_their_lines() -> None:
    compiled = mlc.compile(coin)
    compiled(torch.ones(2, requires_grad=True))
    assert compiled.plan is not None
    text = compiled.plan.explain()
    (line,) = [x for x in text.splitlines() if x.startswith("guard: ")]
    assert "test_guards.py" in line
    assert "(4 times)" in line


@pytest.mark.slow
def test_a_program_whose_guards_never_hold_says_so() -> None:
    compiled = mlc.compile(coin)
    with pytest.warns(mlc.MlcWarning, match=r"recorded anew at 4 calls in a row.*test_guards\.py"):
        for seed in range(12):
            torch.manual_seed(seed)
            compiled(torch.ones(2, requires_grad=True))
            if compiled.recordings > 5:
                break


def test_a_meta_parameter_that_only_decides_has_a_derivative_of_zero() -> None:
    def train(limit: Tensor, x: Tensor) -> Tensor:
        p = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(p.square().sum(), p)
        ratio = g.norm() / limit
        scale = ratio if ratio > 1 else 1.0
        with torch.no_grad():
            p -= 0.1 * g / scale
        return p.sum()

    limit = torch.tensor(50.0, requires_grad=True)
    with pytest.warns(
        mlc.MlcWarning, match=r"gradient of limit is zero: it only decides a branch, at .*test_guards\.py"
    ):
        value = mlc.compile(train)(limit, torch.ones(3))
    (got,) = torch.autograd.grad(value, limit)
    assert got == 0
