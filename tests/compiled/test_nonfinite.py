"""NaN and infinity: the level, the step and the line where they began, and nothing of the user's changed."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlc


def train(w: Tensor, scale: Tensor, batches: Any, inner: Callable[..., Tensor], rate: float = 0.1) -> Tensor:
    p = nn.Parameter(w.clone())
    opt = torch.optim.SGD([p], lr=rate)
    for b in batches:
        opt.zero_grad()
        inner(p, scale, b).backward()
        opt.step()
    return (p - 1).square().sum()


def logarithm(p: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    return (scale * (p - b).square().log()).sum()  # here


def quartic(p: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    return scale * (p * b).pow(4).sum()


START = torch.tensor([0.5, 2.0], dtype=torch.float64)


def call(fn: Any, inner: Callable[..., Tensor], batches: Any, rate: float = 0.1) -> Tensor:
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss: Tensor = fn(START, scale, batches, inner, rate)
    loss.backward()
    assert scale.grad is not None
    return scale.grad


def ones(n: int) -> list[Tensor]:
    return [torch.ones(2, dtype=torch.float64) for _ in range(n)]


@pytest.fixture(scope="module")
def guarded() -> Any:
    return mlc.compile(nonfinite="raise", backend="interpreter")(train)


def refused(fn: Any, *args: Any) -> mlc.NonfiniteError:
    with pytest.raises(mlc.NonfiniteError) as e:
        call(fn, *args)
    return e.value


def test_finite_calls_are_as_without(guarded: Any) -> None:
    assert torch.equal(call(guarded, logarithm, ones(3)), call(mlc.compile(train), logarithm, ones(3)))


class Met:
    """Batches of ones; iterating notes the parameters that the given step begins with."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __iter__(self) -> Iterator[Tensor]:
        p = START.clone().requires_grad_()
        for _ in range(self.at - 1):
            yield torch.ones(2, dtype=torch.float64)
            (g,) = torch.autograd.grad(logarithm(p, torch.ones((), dtype=torch.float64), ones(1)[0]), p)
            p = (p - 0.1 * g).detach().requires_grad_()
        yield p.detach()


def test_a_logarithm_of_zero_at_a_later_call(guarded: Any) -> None:
    """The third step meets its batch exactly: 0 under a logarithm."""
    call(guarded, logarithm, ones(4))
    e = refused(guarded, logarithm, [*Met(3), *ones(1)])
    assert (e.level, e.steps) == ("L1", (3,))
    assert e.operator == "aten.div.Tensor"  # in the derivative of the logarithm, whose value nobody asks for
    assert e.loc.source().endswith("# here")
    assert "step 3" in str(e)


def test_a_level_that_diverges_at_a_known_step(guarded: Any) -> None:
    """Plain Python says at which step the parameters leave the range of float64."""
    x, step = 2.0, 0
    while math.isfinite(x):
        step += 1
        try:
            x -= 4.0 * 4 * x**3
        except OverflowError:
            break
    for _ in range(2):
        e = refused(guarded, quartic, ones(9), 4.0)
        assert e.level == "L1"
        assert e.kind == "infinity"
        assert e.steps == (step,)
        assert e.loc.function in ("quartic", "train")


def test_a_nan_in_the_data_is_said_to_be_there(guarded: Any) -> None:
    bad = ones(4)
    bad[1][0] = math.nan
    call(guarded, logarithm, ones(4))
    e = refused(guarded, logarithm, bad)
    assert "NaN was there already, in an item of its data" in str(e)
    assert e.steps == (2,)


def test_the_hypergradient_alone() -> None:
    """The square root of a meta-parameter that is zero: the value is finite, its derivative is not."""

    def fn(lr: Tensor) -> Tensor:
        w = nn.Parameter(START.clone())
        opt = torch.optim.SGD([w], lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            (lr.abs().pow(0.5) * w.square().sum()).backward()
            opt.step()
        return w.sum()

    lr = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = mlc.compile(nonfinite="raise")(fn)(lr)
    with pytest.raises(mlc.NonfiniteError, match="began in the derivative of this line") as e:
        loss.backward()
    assert e.value.loc.line == fn.__code__.co_firstlineno + 5


class Best(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.best = torch.tensor(math.inf, dtype=torch.float64)
        self.mask = torch.tensor([0.0, -math.inf], dtype=torch.float64)
        self.last = torch.tensor(math.inf, dtype=torch.float64)


def test_a_mask_and_a_best_loss_that_begins_at_infinity_are_no_fault() -> None:
    def fn(m: Best, w: Tensor, scale: Tensor) -> Tensor:
        p = nn.Parameter(w.clone())
        opt = torch.optim.SGD([p], lr=0.1)
        for _ in range(2):
            opt.zero_grad()
            loss = (scale * torch.softmax(p + m.mask, 0) * p).sum()
            loss.backward()
            opt.step()
            m.best = torch.minimum(m.best, loss.detach())
            m.last = torch.full_like(m.last, math.inf)
        return p.square().sum()

    cf, m = mlc.compile(nonfinite="raise")(fn), Best()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        cf(m, START, scale).backward()
    assert math.isfinite(m.best)
    assert math.isinf(m.last)


def test_nothing_is_changed() -> None:
    w = nn.Parameter(START.clone())
    opt = torch.optim.SGD([w], lr=0.1, momentum=0.9)

    def fn(scale: Tensor, batches: Any) -> Tensor:
        for b in batches:
            opt.zero_grad()
            (scale * (w * b).square().sum()).backward()
            opt.step()
        return w.sum()

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    cf = mlc.compile(nonfinite="raise")(fn)
    cf(scale, ones(2))
    before, momentum = w.detach().clone(), opt.state[w]["momentum_buffer"].clone()
    with pytest.raises(mlc.NonfiniteError, match="level 'L1', step 2"):
        cf(scale, [ones(1)[0], torch.full((2,), math.inf, dtype=torch.float64)])
    assert torch.equal(w, before)
    assert torch.equal(opt.state[w]["momentum_buffer"], momentum)


def test_the_option() -> None:
    with pytest.raises(mlc.PlanError, match="nonfinite='skip'"):
        mlc.compile(nonfinite="skip")
