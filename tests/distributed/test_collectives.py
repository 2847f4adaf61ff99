"""Every kind of communication in a loop is right, against central differences of the sum over processes, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.nn.functional as dnf
import torch.nn.functional as F
from torch import Tensor, nn

import mlc
from tests.distributed.loops import batches, differences, models, summed, weighted
from tests.distributed.world import alike, run

RIGHT: dict[str, Callable[..., None]] = {}
REFUSED: dict[str, tuple[Callable[..., None], str]] = {}


def _right(f: Callable[..., None]) -> Callable[..., None]:
    RIGHT[f.__name__] = f
    return f


def _refused(text: str) -> Callable[..., Any]:
    def add(f: Callable[..., None]) -> Callable[..., None]:
        REFUSED[f.__name__] = (f, text)
        return f

    return add


# ---- what a step may do between its loss and the optimizer


@_right
def loss_reduced(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    (dnf.all_reduce(loss) / n).square().backward()


@_right
def loss_gathered(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    torch.stack(dnf.all_gather(loss)).square().mean().backward()


@_right
def loss_broadcast(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    (loss * dnf.broadcast(loss, 1)).backward()


@_right
def loss_scattered(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    dnf.reduce_scatter(torch.empty(()), [loss * (i + 1 + rank) for i in range(n)]).square().backward()


@_right
def loss_exchanged(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    parts = torch.stack([loss * (i + 1) for i in range(n)])
    dnf.all_to_all_single(torch.empty(n), parts).square().sum().backward()


@_right
def functional_loss(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    whole = fc.all_gather_tensor(loss.reshape(1), 0, dist.group.WORLD)
    (fc.all_reduce(loss, "sum", dist.group.WORLD) * whole.square().sum()).backward()


@_right
def broadcast_gradients(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    for p in m.parameters():
        dist.broadcast(p.grad, 1)


@_right
def broadcast_parameters(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    with torch.no_grad():
        for p in m.parameters():
            dist.broadcast(p, 0)


@_right
def largest_gradient(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    for p in m.parameters():
        dist.all_reduce(p.grad, op=dist.ReduceOp.MAX)


@_right
def exchanged_gradients(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    for p in m.parameters():
        mine = torch.stack([p.grad * (i + 1) for i in range(n)])
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine)
        p.grad.copy_(theirs.mean(0))


@_right
def hooks(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    def average(p: Tensor) -> None:
        dist.all_reduce(p.grad)
        p.grad /= n

    handles = [p.register_post_accumulate_grad_hook(average) for p in m.parameters()]
    loss.backward()
    for h in handles:
        h.remove()


@_right
def metric_that_decides(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    seen = loss.detach().clone()
    dist.all_reduce(seen)
    if seen.item() > 1e6:
        raise AssertionError
    if rank == 0:
        assert f"{seen.item():.3f}"


@_right
def clipped_by_the_norm_of_all(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    norm = sum(p.grad.square().sum() for p in m.parameters())
    dist.all_reduce(norm)
    for p in m.parameters():
        p.grad.mul_(torch.clamp(0.1 / norm.sqrt(), max=1.0))


@_refused("takes for the identity")
def loss_in_place(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    dist.all_reduce(loss)
    loss.backward()


@_refused("a barrier")
def barrier(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    dist.barrier()


@_refused("Python objects")
def objects(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    dist.all_gather_object([None] * n, rank)


@_refused("in the loop")
def point_to_point(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    if rank == 0:
        dist.send(torch.ones(3), 1)
    else:
        dist.recv(torch.empty(3), 0)


@_refused("gather in the loop")
def gather(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    dist.gather(loss.detach(), [torch.empty(()) for _ in range(n)] if rank == 0 else None, 0)


@_refused("scatter in the loop")
def scatter(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    dist.scatter(torch.empty(()), [torch.ones(()) for _ in range(n)] if rank == 0 else None, 0)


@_refused("reduce in the loop")
def reduce(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    for p in m.parameters():
        dist.reduce(p.grad, 0)


@_refused("custom autograd.Function communicates")
def custom(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            g = g.clone()
            dist.all_reduce(g)
            return g

    Sum.apply(loss).backward()


@_refused("all_reduce")
def product(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    for p in m.parameters():
        dist.all_reduce(p.grad, op=dist.ReduceOp.PRODUCT)


@_refused("made in the loop")
def wrapped_in_the_loop(m: nn.Module, loss: Tensor, rank: int, n: int) -> None:
    loss.backward()
    nn.parallel.DistributedDataParallel(m)


# ---- the jobs


def _loop(step: Callable[..., None], model: Any, weigh: Any, data: Any, val: Any, rank: int, n: int) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in data:
        opt.zero_grad()
        step(model, weighted(model, weigh, x, y), rank, n)
        opt.step()
    return F.cross_entropy(model(val[0]), val[1])


def _call(fn: Any, step: Any, rank: int, n: int, h: float = 0.0) -> tuple[Tensor, Any, Any]:
    model, weigh = models()
    data, val = batches(rank, n, steps=2)
    with torch.no_grad():
        for p, d in zip(weigh.parameters(), _directions(rank, weigh), strict=True):
            p.add_(h * d)
    return fn(step, model, weigh, data, val, rank, n), model, weigh


def _directions(rank: int, weigh: nn.Module) -> list[Tensor]:
    """Each process moves its own copy."""
    g = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(p.shape, generator=g) for p in weigh.parameters()]


def _right_job(rank: int, n: int, names: list[str]) -> Any:
    out = []
    for name in names:
        step = RIGHT[name]
        cf = mlc.compile(_loop)
        loss, model, weigh = _call(cf, step, rank, n)
        loss.backward()
        parts = [(p.grad * d).sum() for p, d in zip(weigh.parameters(), _directions(rank, weigh), strict=True)]
        got = float(summed(torch.stack(parts).sum()))
        again, later, _ = _call(cf, step, rank, n)
        plain, eager, _ = _call(_loop, step, rank, n)
        gaps = [float((a - b).detach().abs()) for a, b in ((loss, plain), (again, plain))]
        for m in (model, later):
            gaps += [float((p - q).detach().abs().max())
                     for p, q in zip(m.parameters(), eager.parameters(), strict=True)]  # fmt: skip
        want = differences(lambda h, step=step: _call(_loop, step, rank, n, h)[0])
        out.append((name, cf.recordings, max(gaps), got, want))
    return out


def _refused_job(rank: int, n: int) -> Any:
    out = {}
    for name, (step, _) in REFUSED.items():
        model, weigh = models()
        data, val = batches(rank, n, steps=2)
        before = [p.detach().clone() for p in model.parameters()]
        called = False
        try:
            loss = mlc.compile(_loop)(step, model, weigh, data, val, rank, n)
            called = True
            loss.backward()
            out[name] = ("", "nothing", False)
        except mlc.MlcError as e:
            out[name] = (type(e).__name__, str(e), e.loc is not None)
        assert called or all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)), name
        dist.barrier()
    return out


_NAMES = list(RIGHT)


@pytest.mark.parametrize("names", [_NAMES[:3], _NAMES[3:6], _NAMES[6:9], _NAMES[9:]], ids="-".join)
def test_right(names: list[str]) -> None:
    for found in alike(run(2, _right_job, names)):
        for name, recordings, gap, got, want in found:
            assert recordings == 1, name
            assert gap < 1e-12, (name, gap)
            assert abs(got - want) < 1e-7 * abs(want), (name, got, want)


def test_refused() -> None:
    results = run(2, _refused_job)
    for found in alike(results):
        for name, (kind, text, line) in found.items():
            assert kind in ("CaptureError", "DifferentiationError", "CommunicationError"), (name, kind, text)
            assert line, (name, text)
    for name, (_, words) in REFUSED.items():
        assert any(words in found[name][1] and "try: " in found[name][1] for found in results), name
