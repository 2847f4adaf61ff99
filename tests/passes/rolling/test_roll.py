"""Rolling: a loop only where every trip is alike; numbers against the plain function and its differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlc
from mlc.ir.core import Loop

X = torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = [torch.rand(4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(1, 9)]


def step(p: Tensor, w: Tensor, x: Tensor, rate: Any = 0.1) -> Tensor:
    (g,) = torch.autograd.grad(((p * w).sin() * x).sum(), p)
    return (p - rate * g).detach().requires_grad_()


def parameters(w: Tensor) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(X.clone())
    return p, torch.optim.SGD([p], lr=0.1)


def trained(w: Tensor, of: Callable[[int], Tensor], rate: Callable[[int], float] = lambda i: 0.1, n: int = 6) -> Tensor:
    """Training in which each step's data and rate are those of its number."""
    p, opt = parameters(w)
    for i in range(n):
        opt.param_groups[0]["lr"] = rate(i)
        opt.zero_grad()
        ((p * w).sin() * of(i)).sum().backward()
        opt.step()
    return (p * w).square().sum()


def remembering(w: Tensor, which: Callable[[int], int]) -> Tensor:
    """Each step reads what an earlier one has written into memory that was there before: state, which no cut stops."""
    p, opt = parameters(w)
    past = [torch.zeros(4, dtype=torch.float64) for _ in range(7)]
    for i in range(6):
        opt.zero_grad()
        each = (p * w).sin() * (1 + past[which(i)])
        each.sum().backward()
        past[i + 1].copy_(each.detach())
        opt.step()
    return (p * w).square().sum()


PROGRAMS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "all alike": (lambda w: trained(w, lambda i: DATA[0]), 1),
    "other data in every step": (lambda w: trained(w, lambda i: DATA[i]), 1),
    "the same data, but for the last step": (lambda w: trained(w, lambda i: DATA[i == 5]), 1),
    "the same data twice, then other": (lambda w: trained(w, lambda i: DATA[0 if i < 2 else i]), 1),
    "a rate for every step": (lambda w: trained(w, lambda i: DATA[i], lambda i: 0.1 / (i + 1)), 1),
    "a rate that is the same at first": (lambda w: trained(w, lambda i: DATA[i], lambda i: 0.1 if i < 2 else 0.05), 1),
    "the value of the step before": (lambda w: remembering(w, lambda i: i), 1),
    "the value of the step before, then an older one": (lambda w: remembering(w, lambda i: i if i < 3 else 1), 2),
    "two values in turn": (lambda w: trained(w, lambda i: DATA[i % 2]), 1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_rolled_program_is_the_loop(name: str) -> None:
    f, loops = PROGRAMS[name]
    w = torch.rand(4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    d = torch.rand(4, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    expected = (f(w + 1e-5 * d) - f(w - 1e-5 * d)) / 2e-5
    meta = w.clone().requires_grad_()
    cf = mlc.compile(f)
    for _ in range(2):  # what the first call hands out is the plain loop's own number
        value = cf(meta)
        torch.testing.assert_close(value.detach(), f(w).detach(), rtol=1e-12, atol=1e-13)
        (g,) = torch.autograd.grad(value, meta)
        torch.testing.assert_close((g * d).sum(), expected.detach(), rtol=1e-7, atol=1e-9)
    found = [e.op for e in cf.program.region.eqns if isinstance(e.op, Loop)]
    assert 1 <= len(found) <= loops, str(cf.program)


def test_what_every_step_gives_is_handed_out() -> None:
    def losses(w: Tensor) -> list[Tensor]:
        p, opt = parameters(w)
        out = []
        for i in range(4):
            opt.zero_grad()
            loss = ((p * w).sin() * DATA[i]).sum()
            loss.backward()
            out.append(loss)
            opt.step()
        return out

    w = torch.rand(4, dtype=torch.float64).requires_grad_()
    cf = mlc.compile(losses)
    cf(w)
    for a, b in zip(cf(w), losses(w), strict=True):
        torch.testing.assert_close(a.detach(), b.detach())


def test_an_iterable_that_is_drawn_from_anew_in_every_epoch() -> None:
    """The visits advance from epoch to epoch; a list that is read twice is read from its start."""

    def epochs(w: Tensor, data: list[Tensor]) -> Tensor:
        p, opt = parameters(w)
        for _ in range(3):
            for x in data:
                opt.zero_grad()
                ((p * w).sin() * x).sum().backward()
                opt.step()
        return (p * w).square().sum()

    w = torch.rand(4, dtype=torch.float64).requires_grad_()
    cf = mlc.compile(epochs)
    for data in (DATA[:2], DATA[2:4], DATA[4:6]):
        torch.testing.assert_close(cf(w, data).detach(), epochs(w, data).detach())
    assert cf.recordings == 1
