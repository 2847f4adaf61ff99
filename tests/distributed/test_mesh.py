"""``mesh=``: processes own different inner problems, hypergradients are averaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import mlc
from tests.distributed.loops import batches, models, weighted
from tests.distributed.world import alike, run


def _task(model: Any, weigh: Any, data: Any, val: Any, steps: int) -> Tensor:
    opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-3)
    for x, y in data[:steps]:
        opt.zero_grad()
        weighted(model, weigh, x, y).backward()
        opt.step()
    return F.cross_entropy(model(val[0]), val[1])


def _problem(task: int) -> tuple[Any, Any, int]:
    """Tasks have batches and numbers of steps of their own."""
    data, val = batches(task, 4)
    return data, val, 2 + task % 2


def _own_problems(rank: int, n: int) -> Any:
    mesh = init_device_mesh("cpu", (2, n // 2) if n > 2 else (n,))
    weigh = models()[1]
    cf = mlc.compile(_task, mesh=mesh)
    grads = []
    for _ in range(2):
        weigh.zero_grad()
        cf(models(rank)[0], weigh, *_problem(rank)).backward()
        grads.append([p.grad.clone() for p in weigh.parameters()])
    mean = [torch.zeros_like(p) for p in weigh.parameters()]
    for task in range(n):  # one process for all of them
        alone = models()[1]
        mlc.compile(_task)(models(task)[0], alone, *_problem(task)).backward()
        for m, p in zip(mean, alone.parameters(), strict=True):
            m += p.grad / n
    return cf.recordings, max(float((a - b).abs().max()) for g in grads for a, b in zip(g, mean, strict=True))


@pytest.mark.slow
def test_hypergradients_of_own_problems_are_averaged() -> None:
    for n in (2, 4):
        for recordings, gap in alike(run(n, _own_problems)):
            assert recordings == 1
            assert gap < 1e-13


def _pairs(rank: int, n: int) -> Any:
    """Two tasks, each on two processes that share its batches: gradients summed in the pair, averaged over pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("task", "data"))
    task, part = mesh.get_coordinate()  # type: ignore[misc]

    def loop(model: Any, weigh: Any, data: Any, val: Any) -> Tensor:
        opt = torch.optim.SGD(model.parameters(), lr=0.2)
        group = mesh["data"].get_group()
        for x, y in data:
            opt.zero_grad()
            weighted(model, weigh, x, y).backward()
            for p in model.parameters():
                dist.all_reduce(p.grad, group=group)
                p.grad /= 2
            opt.step()
        return F.cross_entropy(model(val[0]), val[1])

    cf = mlc.compile(loop, mesh=mesh)
    weigh = models()[1]
    cf(models(task)[0], weigh, *batches(2 * part + task, 4)).backward()
    want = [torch.zeros_like(p) for p in weigh.parameters()]
    for t in range(2):  # the same in one process: both parts of a batch at once
        alone, model = models()[1], models(t)[0]
        halves = [batches(2 * p + t, 4) for p in range(2)]
        data = [
            tuple(torch.cat(z) for z in zip(a, b, strict=True)) for a, b in zip(*(h[0] for h in halves), strict=True)
        ]
        opt_loss = mlc.compile(_sgd)(model, alone, data, [h[1] for h in halves])
        opt_loss.backward()
        for m, p in zip(want, alone.parameters(), strict=True):
            m += p.grad / 2
    return max(float((p.grad - m).abs().max()) for p, m in zip(weigh.parameters(), want, strict=True))


def _sgd(model: Any, weigh: Any, data: Any, vals: Any) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in data:
        opt.zero_grad()
        weighted(model, weigh, x, y).backward()
        opt.step()
    return (F.cross_entropy(model(vals[0][0]), vals[0][1]) + F.cross_entropy(model(vals[1][0]), vals[1][1])) / 2


@pytest.mark.slow
def test_tasks_on_pairs_of_processes() -> None:
    for gap in alike(run(4, _pairs)):
        assert gap < 1e-13


def _different(rank: int, n: int) -> Any:
    weigh = torch.nn.Linear(4, 1 + rank)

    def loop(model: Any, weigh: Any, data: Any, val: Any, steps: int) -> Tensor:
        return _task(model, lambda x: weigh(x).sum(-1, keepdim=True).sigmoid(), data, val, steps)

    try:
        mlc.compile(loop, mesh=init_device_mesh("cpu", (n,)))(models()[0], weigh, *_problem(rank)).backward()
    except mlc.MlcError as e:
        return type(e).__name__, str(e)
    return "", ""


def test_other_meta_parameters_on_another_process_are_an_error() -> None:
    for kind, text in alike(run(2, _different)):
        assert kind == "CommunicationError", text
        assert "weigh.weight: f64[1,4]" in text
        assert "weigh.weight: f64[2,4]" in text
