"""Loops that average gradients over processes give the hypergradient of one process on the union of the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlc
from tests.distributed.loops import batches, models, train, unroll
from tests.distributed.world import alike, run


def _each(model: Any) -> None:
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def _handles(model: Any) -> None:
    handles = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters()]
    for h in handles:
        h.wait()
    for p in model.parameters():
        p.grad.div_(dist.get_world_size())


def _bucket(model: Any) -> None:
    flat = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
    dist.all_reduce(flat)
    at = 0
    for p in model.parameters():
        p.grad.copy_(flat[at : at + p.numel()].view_as(p) / dist.get_world_size())
        at += p.numel()


def _coalesced(model: Any) -> None:
    with dist._coalescing_manager():
        for p in model.parameters():
            dist.all_reduce(p.grad)
    for p in model.parameters():
        p.grad /= dist.get_world_size()


def _gathered(model: Any) -> None:
    for p in model.parameters():
        parts = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, p.grad)
        p.grad = torch.stack(parts).mean(0)


def _scattered(model: Any) -> None:
    n = dist.get_world_size()
    for p in model.parameters():
        padded = torch.zeros(-(-p.numel() // n) * n)
        padded[: p.numel()] = p.grad.flatten()
        mine = torch.empty(padded.numel() // n)
        dist.reduce_scatter_tensor(mine, padded)
        dist.all_gather_into_tensor(padded, mine / n)
        p.grad.copy_(padded[: p.numel()].view_as(p))


def _functional(model: Any) -> None:
    import torch.distributed._functional_collectives as fc

    for p in model.parameters():
        p.grad = fc.all_reduce(p.grad, "avg", dist.group.WORLD) * 1.0


def _nothing(model: Any) -> None:
    pass


WAYS = {
    "each": _each, "handles": _handles, "bucket": _bucket, "coalesced": _coalesced, "gathered": _gathered,
    "scattered": _scattered, "functional": _functional, "ddp": _nothing,
}  # fmt: skip


def _job(rank: int, n: int, ways: list[str], optimizer: str) -> Any:
    out = []
    for way in ways:
        model, weigh = models()
        data, val = batches(rank, n)
        given = DistributedDataParallel(model) if way == "ddp" else model
        cf = mlc.compile(train)
        found = []
        for _ in range(2):
            with torch.no_grad():  # the second call starts where the first one did
                for p, q in zip(model.parameters(), models()[0].parameters(), strict=True):
                    p.copy_(q)
                    p.grad = None
            loss = cf(given, weigh, data, val, optimizer, WAYS[way])
            loss.backward()
            grads = [p.grad for p in weigh.parameters()]
            weigh.zero_grad()
            mean = loss.detach().clone()
            for t in (mean, *grads):
                dist.all_reduce(t)
                t /= n
            found.append((mean, grads, [p.detach().clone() for p in model.parameters()]))
        out.append((way, cf.recordings, found))
    return out


def _compare(results: list[Any], optimizer: str) -> None:
    loss, grads, trained = unroll(optimizer)
    for found in alike(results):
        for way, recordings, calls in found:
            assert recordings == 1, way
            for got_loss, got_grads, got_trained in calls:
                torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0, msg=way)
                for a, b in zip((*got_grads, *got_trained), (*grads, *trained), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def _double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("ways", [["each", "ddp"], ["handles", "bucket"], ["coalesced", "functional"],
                                  ["gathered", "scattered"]], ids="-".join)  # fmt: skip
def test_two_processes_with_sgd(ways: list[str]) -> None:
    _compare(run(2, _job, ways, "sgd"), "sgd")


def test_two_processes_with_adam() -> None:
    _compare(run(2, _job, ["ddp", "each"], "adam"), "adam")


@pytest.mark.slow
def test_four_processes() -> None:
    _compare(run(4, _job, ["ddp", "bucket"], "adam"), "adam")


def test_one_process_in_a_world_of_its_own() -> None:
    _compare(run(1, _job, ["ddp", "each"], "sgd"), "sgd")
