"""Losses whose gradient PyTorch cannot differentiate: spelled out, against differences of PyTorch's own gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mlc
from mlc.ir.builder import Builder
from mlc.ir.types import TensorType
from mlc.passes.autodiff.reverse import pullback
from mlc.runtime.interpreter.interpreter import compile_region

A: Any = torch.ops.aten
Emit = Callable[[Any, tuple[Any, ...], list[Tensor]], tuple[Any, ...]]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def second(x: Tensor, build: Callable[[Emit, Any], Any], g: Tensor, u: Tensor) -> Tensor:
    """d <u, dL/dx . g> / dx, by two reverse sweeps over ``build``'s equations."""
    b = Builder()
    v = b.input(TensorType.of(x))

    fixed: list[Tensor] = []

    def emit(op: Any, args: tuple[Any, ...], like: list[Tensor]) -> tuple[Any, ...]:
        fixed.extend(a for a in args if isinstance(a, Tensor))
        args = tuple(b.input(TensorType.of(a)) if isinstance(a, Tensor) else a for a in args)
        return b.emit(op, args, [TensorType.of(t) for t in like])

    out = build(emit, v)
    seed = b.input(TensorType.of(g))
    first = pullback(b, list(b.eqns), {out: seed}, [v])[v]
    along = b.input(TensorType.of(u))
    found = pullback(b, list(b.eqns), {first: along}, [v])[v]
    (value,) = compile_region(b.region([found]), lambda e: None)([x, *fixed, g, u])
    return value


def agree(x: Tensor, loss: Callable[[Tensor], Tensor], build: Callable[[Emit, Any], Any]) -> None:
    g, u, along = torch.randn(loss(x).shape), torch.randn(x.shape), torch.randn(x.shape)

    def slope(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return (torch.autograd.grad(loss(at), at, g)[0] * u).sum()

    want = (slope(x + 1e-5 * along) - slope(x - 1e-5 * along)) / 2e-5
    assert want.abs() > 1e-3
    torch.testing.assert_close((second(x, build, g, u) * along).sum(), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("impossible", [False, True], ids=["possible", "one_impossible"])
@pytest.mark.parametrize("form", ["padded", "joined"])
def test_ctc(form: str, impossible: bool) -> None:
    frames, lengths = [6, 5, 2 if impossible else 4], [2, 1, 2]
    labels = torch.tensor([[1, 2], [3, 0], [2, 2]] if form == "padded" else [1, 2, 3, 2, 2])
    if form == "joined":
        labels = labels.reshape(-1)
    x = torch.randn(6, 3, 4)

    def run(logp: Tensor) -> Any:
        return A._ctc_loss.default(logp, labels, frames, lengths, 0, impossible)

    def build(emit: Emit, v: Any) -> Any:
        logp = x.log_softmax(2)
        (p,) = emit(A._log_softmax.default, (v, 2, False), [logp])
        return emit(A._ctc_loss.default, (p, labels, frames, lengths, 0, impossible), list(run(logp)))[0]

    agree(x, lambda t: run(t.log_softmax(2))[0], build)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_multi_margin(reduction: int, weighted: bool) -> None:
    """The second derivative of the squared form; the other one has none."""
    x, y, w = torch.randn(5, 4), torch.randint(4, (5,)), torch.rand(4) if weighted else None
    args = (y, 2, 0.7, w, reduction)
    op = A.multi_margin_loss.default
    agree(x, lambda t: op(t, *args), lambda emit, v: emit(op, (v, *args), [op(x, *args)])[0])


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_multilabel_margin(reduction: int) -> None:
    x, y = torch.randn(5, 4) * 0.3, torch.tensor([[1, 2, -1, 0]] * 5)
    op, sine = A.multilabel_margin_loss_forward.default, A.sin.default

    def build(emit: Emit, v: Any) -> Any:
        (s,) = emit(sine, (v,), [x.sin()])
        return emit(op, (s, y, reduction), list(op(x.sin(), y, reduction)))[0]

    agree(x, lambda t: op(t.sin(), y, reduction)[0], build)


def test_rows_shortened_by_an_embedding() -> None:
    """``Embedding(max_norm=...)`` writes its weight; the derivative goes through that as through any update."""
    w, at = torch.randn(6, 3), torch.tensor([0, 2, 2, 5])
    op = A.embedding_renorm.default
    b = Builder()
    v, seed = b.input(TensorType.of(w)), b.input(TensorType.of(w))
    index = b.input(TensorType.of(at))
    (out,) = b.emit(op, (v, index, 1.0, 2.0), [TensorType.of(w)])
    found = pullback(b, list(b.eqns), {out: seed}, [v])[v]
    g, along = torch.randn(6, 3), torch.randn(6, 3)
    (got,) = compile_region(b.region([found]), lambda e: None)([w, g, at])
    ends = [(op(w + h * along, at, 1.0, 2.0) * g).sum() for h in (1e-6, -1e-6)]
    torch.testing.assert_close((got * along).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "margin": lambda x: F.multi_margin_loss(x, torch.tensor([0, 2]), reduction="none"),
    "squared margin": lambda x: F.multi_margin_loss(x, torch.tensor([0, 2]), p=2, reduction="none"),
    "labels": lambda x: F.multilabel_margin_loss(x, torch.tensor([[0, -1, 1], [2, 1, -1]]), reduction="none"),
    "ctc of numbers": lambda x: F.ctc_loss(
        x.log_softmax(-1).unsqueeze(1).expand(2, 2, 3), torch.tensor([[1, 2], [2, 1]]), (2, 2), (2, 1),
    ),
    "ctc": lambda x: F.ctc_loss(
        x.log_softmax(-1).unsqueeze(1).expand(2, 2, 3).reshape(4, 1, 3), torch.tensor([[1, 2]]),
        torch.tensor([4]), torch.tensor([2]), reduction="none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flows", ["mixed", "reverse", "forward"])
@pytest.mark.parametrize("name", LOSSES)
def test_two_steps_with_the_loss_squared(name: str, flows: Any) -> None:
    """The second step's gradient moves with the weights and with its own cotangent at once."""

    def train(w: Tensor) -> Tensor:
        t = torch.tensor([[0.9, 0.8, 0.1], [0.2, 1.5, 0.9]]).requires_grad_()
        opt = torch.optim.SGD([t], lr=0.05)
        for _ in range(2):
            opt.zero_grad()
            each = LOSSES[name](t * 1.0)
            (w.sum() * each * each).sum().backward()
            opt.step()
        return t.square().sum()

    start, along, h = torch.tensor([0.3, 0.7]), torch.tensor([1.0, -0.4]), 1e-6
    want = (train(start + h * along) - train(start - h * along)).item() / (2 * h)
    w = start.clone().requires_grad_()
    (got,) = torch.autograd.grad(mlc.compile(train, flows=flows)(w), [w])
    assert (got @ along).item() == pytest.approx(want, rel=1e-7)
