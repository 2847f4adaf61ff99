"""Hooks from call to call: what they read may change, and they may come and go."""

import copy
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from tests.numerics import test_hooks_values
from tests.numerics.models import CLASSES, task, train_loss, val_loss

EPS = 1e-3
LIMIT = 0.01


# --- later calls


def plain(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.3)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()
    return val_loss(model, val)


def outcome(fn, args: dict[str, Any]) -> list[Tensor]:
    value = fn(**args)
    return [value.detach(), *(p.detach().clone() for p in args["model"].parameters())]


def check_again(compiled, change: Callable[[dict[str, Any]], None], args: dict[str, Any]) -> None:
    """After a change, the same compiled function does what the plain one does."""
    change(args)
    other = copy.deepcopy(args)
    for one, two in zip(args["model"].modules(), other["model"].modules(), strict=True):
        two._backward_hooks = one._backward_hooks
    for one, two in zip(args["model"].parameters(), other["model"].parameters(), strict=True):
        for f in (one._backward_hooks or {}).values():
            two.register_hook(f)
        for f in (one._post_accumulate_grad_hooks or {}).values():
            two.register_post_accumulate_grad_hook(f)
    for a, b in zip(outcome(compiled, args), outcome(plain, other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_what_a_hook_reads_may_change_between_calls(mlc: ModuleType) -> None:
    scale, compiled, args = [0.5], mlc.compile(plain), task().args()
    args["model"][0].weight.register_hook(lambda g: g * scale[0])

    def tell(value: float) -> Callable[[dict[str, Any]], None]:
        return lambda args: scale.__setitem__(0, value)

    for value in (0.5, 0.5, 3.0, 0.0):
        check_again(compiled, tell(value), args)
    assert compiled.recordings == 3


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_may_come_and_go_between_calls(kind: str, mlc: ModuleType) -> None:
    def halve(x):
        if x.is_leaf and x.grad is not None:
            x.grad.mul_(0.5)
            return None
        return 0.5 * x

    compiled, args, handles = mlc.compile(plain), task().args(), []
    p = args["model"][0].weight
    for change in (
        lambda args: None,
        lambda args: handles.append(getattr(p, kind)(halve)),
        lambda args: handles.append(getattr(p, kind)(halve)),
        lambda args: handles.pop().remove(),
        lambda args: handles.pop().remove(),
    ):
        check_again(compiled, change, args)
    assert compiled.recordings == 3  # none, one, two; then known


def test_hooks_of_every_module_are_noticed(mlc: ModuleType) -> None:
    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return sum(p.square().sum() for p in model.parameters())

    def double(module, given, made):
        return (2 * given[0],) if isinstance(module, nn.Tanh) else None

    def shift(module, given, made):
        return made + 1 if isinstance(module, nn.Tanh) else made

    compiled = mlc.compile(loop)
    every = nn.modules.module
    for put, hook in (
        (every.register_module_full_backward_hook, double),
        (every.register_module_forward_hook, shift),
    ):
        for on in (False, True, False):
            handle = put(hook) if on else None
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Full backward hook is firing")
                    args = task().args()
                    other = copy.deepcopy(args)
                    got, want = compiled(**args), loop(**other)
            finally:
                if handle is not None:
                    handle.remove()
            assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-10)
    assert compiled.recordings == 3


def test_what_hooks_leave_in_lists_is_left_at_every_call(mlc: ModuleType) -> None:
    def loop(model, meta, batches, val, seen):
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            opt.zero_grad()
            h = model[0](x)
            h.register_hook(lambda g: seen.append(g.norm().item()))
            handle = model[2].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
            handle_before = model[2].weight.register_hook(lambda g: seen.append(g))
            meta(F.cross_entropy(model[2](model[1](h)), y, reduction="none"), y).backward()
            handle.remove()
            handle_before.remove()
            opt.step()
        return val_loss(model, val)

    compiled, lists = mlc.compile(loop), ([], [])
    args, other = task().args(), None
    other = copy.deepcopy(args)
    for _ in range(3):
        for fn, a, seen in ((compiled, args, lists[0]), (loop, other, lists[1])):
            seen.clear()
            fn(**a, seen=seen)
        assert len(lists[0]) == 9
        for one, two in zip(*lists, strict=True):
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=1e-9, atol=1e-12)
    assert compiled.recordings == 1


def test_the_tables_are_as_they_were(mlc: ModuleType) -> None:
    """Of tensors with hooks from before the call, whether it ends well or not."""
    args, fail = task().args(), [True]

    def hook(g):
        if fail[0]:
            raise ValueError("in a hook of the user's")

    p = args["model"][0].weight
    handle = p.register_hook(hook)
    with pytest.raises(ValueError, match="of the user's"):
        mlc.compile(plain)(**args)
    assert dict(p._backward_hooks) == {handle.id: hook}
    fail[0] = False
    mlc.compile(plain)(**args)
    assert dict(p._backward_hooks) == {handle.id: hook}


@pytest.mark.parametrize("copied", [False, True])
def test_gradients_of_what_was_made_before_the_call_are_seen_outside(copied: bool, mlc: ModuleType) -> None:
    """A hook in the loop is refused with a way round, and that works."""

    def loop(model, meta, batches, val, inside):
        opt = SGD(model.parameters(), lr=0.3)
        for x, y in batches:
            w = 2 * meta if copied else meta
            if inside:
                w.register_hook(lambda g: 3 * g)
            opt.zero_grad()
            (w[y] * F.cross_entropy(model(x), y, reduction="none")).mean().backward(retain_graph=True)
            opt.step()
        return val_loss(model, val)

    args, source = task().args(), torch.randn(CLASSES, requires_grad=True)
    with pytest.raises(mlc.MlcError, match=r"computed before the call[\s\S]*(outside of|before) the call"):
        mlc.compile(loop)(**{**args, "meta": torch.sigmoid(source)}, inside=True)
    found = []
    for factor in (None, 3):
        args, weights = task().args(), torch.sigmoid(source)
        if factor is not None:
            weights.register_hook(lambda g: 3 * g)
        torch.manual_seed(2)
        for p in args["model"].parameters():
            p.data = torch.randn_like(p)
        data = [(torch.ones(6, 4) * i, torch.arange(6) % CLASSES) for i in range(1, 4)]
        out = mlc.compile(loop)(**{**args, "meta": weights, "batches": data, "val": data[0]}, inside=False)
        found += torch.autograd.grad(out, source)
    torch.testing.assert_close(found[1], 3 * found[0])


def test_errors_of_pytorch_name_the_hook(mlc: ModuleType) -> None:
    def of_another_shape(g):
        return g.sum()

    args = task().args()
    args["model"][0].weight.register_hook(of_another_shape)
    with pytest.raises(RuntimeError, match="of_another_shape"):
        mlc.compile(plain)(**args)


def test_check_agrees(mlc: ModuleType) -> None:
    """`mlc.check` compares with a plain unroll and with differences."""
    setup = next(p for p in test_hooks_values.SUITE if p.name == "scaled_on_the_way").fresh()
    report = mlc.check(setup.loop, **setup.args)
    assert report.ok, str(report)
