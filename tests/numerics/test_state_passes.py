"""What is written into state in place passes the derivative, however it is written; differences are the referee.

Every program trains with per-class weights and a number `t` that enters an update, in the forms that people write.
"""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.numerics.reference import directional

LOOPS: dict[str, Callable[..., Tensor]] = {}


def loop(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    LOOPS[fn.__name__] = fn
    return fn


def make() -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    weights, t = torch.rand(3, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(3)]
    return model, weights, t, batches, (torch.randn(5, 4), torch.randint(3, (5,)))


def loss(model: nn.Module, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (weights[y] * F.cross_entropy(model(x), y, reduction="none")).mean()


@loop
def data_assigned(m, w, t, batches, val):
    for x, y in batches:
        m.zero_grad()
        loss(m, w, x, y).backward()
        for p in m.parameters():
            p.data = p.data - t * p.grad
    return F.cross_entropy(m(val[0]), val[1])


@loop
def data_written(m, w, t, batches, val):
    for x, y in batches:
        m.zero_grad()
        loss(m, w, x, y).backward()
        for p in m.parameters():
            p.data.add_(-t * p.grad)
    return F.cross_entropy(m(val[0]), val[1])


@loop
def data_of_the_gradient(m, w, t, batches, val):
    for x, y in batches:
        m.zero_grad()
        loss(m, w, x, y).backward()
        for p in m.parameters():
            p.data.add_(-t * p.grad.data)
    return F.cross_entropy(m(val[0]), val[1])


@loop
def detached_gradient(m, w, t, batches, val):
    for x, y in batches:
        m.zero_grad()
        loss(m, w, x, y).backward()
        with torch.no_grad():
            for p in m.parameters():
                p -= t * p.grad.detach()
    return F.cross_entropy(m(val[0]), val[1])


def trained(m, w, t, batches, after):
    opt = torch.optim.SGD(m.parameters(), lr=0.2)
    for x, y in batches:
        opt.zero_grad()
        (t * loss(m, w, x, y)).backward()
        opt.step()
        after()


@loop
def moving_average(m, w, t, batches, val):
    average = copy.deepcopy(m)

    def update():
        with torch.no_grad():
            for p, q in zip(average.parameters(), m.parameters(), strict=True):
                p.mul_(0.5).add_(t * q)

    trained(m, w, t, batches, update)
    return F.cross_entropy(average(val[0]), val[1])


@loop
def averaged_model(m, w, t, batches, val):
    average = torch.optim.swa_utils.AveragedModel(m)
    trained(m, w, t, batches, lambda: average.update_parameters(m))
    return F.cross_entropy(average(val[0]), val[1])


@loop
def frozen_teacher(m, w, t, batches, val):
    teacher, opt = copy.deepcopy(m).requires_grad_(False), torch.optim.SGD(m.parameters(), lr=0.2)
    for x, y in batches:
        opt.zero_grad()
        (loss(m, w, x, y) + 0.1 * F.mse_loss(m(x), teacher(x))).backward()
        opt.step()
        for p, q in zip(teacher.parameters(), m.parameters(), strict=True):
            p.data.mul_(0.5).add_(q.data * t)
    return F.cross_entropy(teacher(val[0]), val[1])


@loop
def frozen_after_a_step(m, w, t, batches, val):
    opt = torch.optim.SGD(m.parameters(), lr=0.2)
    for i, (x, y) in enumerate(batches):
        if i == 1:
            m[0].requires_grad_(False)
        opt.zero_grad()
        (t * loss(m, w, x, y)).backward()
        opt.step()
    return F.cross_entropy(m(val[0]), val[1])


@loop
def momentum_by_hand(m, w, t, batches, val):
    buffers = [torch.zeros_like(p) for p in m.parameters()]
    for x, y in batches:
        grads = torch.autograd.grad(loss(m, w, x, y), list(m.parameters()))
        with torch.no_grad():
            for p, g, b in zip(m.parameters(), grads, buffers, strict=True):
                b.mul_(0.9).add_(g)
                p.sub_(t * b)
    return F.cross_entropy(m(val[0]), val[1])


@loop
def slow_weights(m, w, t, batches, val):
    slow = [p.detach().clone() for p in m.parameters()]

    def update():
        with torch.no_grad():
            for s, p in zip(slow, m.parameters(), strict=True):
                s.add_(0.5 * (p - s))
                p.copy_(s)

    trained(m, w, t, batches, update)
    return F.cross_entropy(m(val[0]), val[1])


@loop
def sharpness(m, w, t, batches, val):
    opt = torch.optim.SGD(m.parameters(), lr=0.2)
    for x, y in batches:
        opt.zero_grad()
        loss(m, w, x, y).backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in m.parameters()))
        moves = [p.grad * (0.05 / norm) for p in m.parameters()]
        for p, e in zip(m.parameters(), moves, strict=True):
            p.data.add_(e)
        opt.zero_grad()
        (t * loss(m, w, x, y)).backward()
        for p, e in zip(m.parameters(), moves, strict=True):
            p.data.sub_(e)
        opt.step()
    return F.cross_entropy(m(val[0]), val[1])


@loop
def written_between_two_reads(m, w, t, batches, val):
    p = nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([p], lr=0.1)
    for x, _ in batches:
        opt.zero_grad()
        first = (p * x[0, :3]).sum() * t
        with torch.no_grad():
            p.mul_(0.5)
        (first + (w * p * p).sum()).backward()
        opt.step()
    return (p * p * w).sum()


@loop
def running_statistics(m, w, t, batches, val):
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(norm, m)
    trained(net, w, t, batches, lambda: None)
    norm.eval()
    return F.cross_entropy(net(val[0] + w.sum()), val[1])


@loop
def views_of_one_vector(m, w, t, batches, val):
    flat = torch.cat([p.detach().reshape(-1) for p in m.parameters()])
    at = 0
    for p in m.parameters():
        p.data = flat[at : at + p.numel()].view_as(p)
        at += p.numel()
    for x, y in batches:
        m.zero_grad()
        loss(m, w, x, y).backward()
        flat -= t.detach() * torch.cat([p.grad.reshape(-1) for p in m.parameters()])
    return F.cross_entropy(m(val[0]), val[1]) * t


def moved(fn: Callable[..., Tensor], directions: list[Tensor], step: float) -> float:
    args = make()
    for p, d in zip(args[1:3], directions, strict=True):
        p.data.add_(d, alpha=step)
    return float(fn(*args).detach())


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore::mlc.MlcWarning")
def test_the_gradient_is_that_of_differences(name: str, mlc: ModuleType) -> None:
    fn, args = LOOPS[name], make()
    value = mlc.compile(fn)(*args)
    plain = fn(*make())
    assert float(value.detach()) == pytest.approx(float(plain.detach()), rel=1e-10)
    value.backward()
    torch.manual_seed(7)
    directions = [torch.randn_like(p) for p in args[1:3]]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(args[1:3], directions, strict=True) if p.grad is not None)
    measured, spread = directional(lambda h: moved(fn, directions, h))
    assert slope == pytest.approx(measured, rel=1e-6, abs=1e-9), f"spread {spread:.1e}"
