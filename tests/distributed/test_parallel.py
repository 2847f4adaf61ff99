"""DistributedDataParallel in the loop: as eager PyTorch's reducer, and the derivative of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import mlc
from tests.distributed.loops import batches, differences, summed, weighted
from tests.distributed.world import alike, run


class _Branches(nn.Module):
    """Parts that not every forward pass uses, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x).tanh()
        return out


def _network(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind.startswith("unused"):
        return _Branches()
    norm = [nn.BatchNorm1d(5)] if "norm" in kind else []
    return nn.Sequential(nn.Linear(4, 5), *norm, nn.Tanh(), nn.Linear(5, 3))


_OPTIONS: dict[str, dict[str, Any]] = {
    "norm_without_broadcast": {"broadcast_buffers": False}, "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True}, "views": {"gradient_as_bucket_view": True},
}  # fmt: skip


def _make(kind: str, rank: int, n: int) -> tuple[Any, Any, Any, Any]:
    model = DistributedDataParallel(_network(kind), **_OPTIONS.get(kind, {}))
    weigh: Any = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    data, val = batches(rank, n, steps=2)
    if kind == "meta":
        weigh = DistributedDataParallel(weigh)
    if kind == "uneven" and rank == 1:
        data = [(x[:-1], y[:-1]) for x, y in data]
    if kind == "sampler":
        whole = batches(0, 1, steps=2)[0]
        ds = TensorDataset(*(torch.cat(t) for t in zip(*whole, strict=True)))
        loader = DataLoader(ds, batch_size=4, sampler=DistributedSampler(ds, n, rank, seed=5))
        return model, weigh, loader, val
    if kind == "armed":
        model(val[0])  # an eager forward pass without a backward
    return model, weigh, data, val


def _plain(model: Any, weigh: Any, data: Any, val: Any) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    for x, y in data:
        opt.zero_grad()
        weighted(model, weigh, x, y).backward()
        opt.step()
    return F.cross_entropy(model(val[0]), val[1])


def _norm(model: Any, weigh: Any, data: Any, val: Any) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in data:
        model.train()
        opt.zero_grad()
        weighted(model, weigh, x, y).backward()
        opt.step()
        model.eval()
        with torch.no_grad():
            model(val[0])
    return F.cross_entropy(model(val[0]), val[1])


def _accumulating(model: Any, weigh: Any, data: Any, val: Any) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in data:
        opt.zero_grad()
        with model.no_sync():
            weighted(model, weigh, x[:2], y[:2]).backward()
        weighted(model, weigh, x[2:], y[2:]).backward()
        opt.step()
    return F.cross_entropy(model(val[0]), val[1])


def _epochs(model: Any, weigh: Any, loader: Any, val: Any) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            opt.zero_grad()
            weighted(model, weigh, x, y).backward()
            opt.step()
    return F.cross_entropy(model(val[0]), val[1])


def _local(model: Any, weigh: Any, data: Any, val: Any) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in data:
        opt.zero_grad()
        with model.no_sync():
            weighted(model, weigh, x, y).backward()
        opt.step()
    return F.cross_entropy(model.module(val[0]), val[1])


LOOPS: dict[str, Callable[..., Tensor]] = {
    "plain": _plain, "norm": _norm, "norm_without_broadcast": _norm, "accumulating": _accumulating, "unused": _plain,
    "static": _plain, "views": _plain, "meta": _plain, "uneven": _plain, "sampler": _epochs, "armed": _plain,
    "local": _local,
}  # fmt: skip


def _directions(kind: str, rank: int, weigh: Any) -> list[Tensor]:
    """Each process moves its own copy; copies that are kept alike move alike."""
    g = torch.Generator().manual_seed(100 + (0 if kind == "meta" else rank))
    return [torch.randn(p.shape, generator=g) for p in weigh.parameters()]


def _job(rank: int, n: int, kinds: list[str]) -> Any:
    return [(kind, *_one(rank, n, kind)) for kind in kinds]


def _one(rank: int, n: int, kind: str) -> Any:
    loop = LOOPS[kind]
    cf = mlc.compile(loop)
    mine, plain = _make(kind, rank, n), _make(kind, rank, n)
    gaps, slopes = [], []
    for _ in range(2):  # goes on from where the first call left everything
        start = {k: v.clone() for k, v in plain[0].state_dict().items()}
        loss = cf(*mine)
        loss.backward()
        along = _directions(kind, rank, mine[1])
        parts = [(p.grad * d).sum() for p, d in zip(mine[1].parameters(), along, strict=True)]
        got = float(summed(torch.stack(parts).sum()))
        mine[1].zero_grad()
        want = loop(*plain)
        plain[1].zero_grad()
        gaps.append(float((loss - want).detach().abs()))
        for a, b in zip(mine[0].state_dict().values(), plain[0].state_dict().values(), strict=True):
            gaps.append(float((a - b).abs().max()))
        slopes.append((got, differences(lambda h, start=start: _moved(kind, rank, n, h, start))))
    return max(gaps), slopes


def _moved(kind: str, rank: int, n: int, h: float, start: Any) -> Tensor:
    model, weigh, data, val = _make(kind, rank, n)
    model.load_state_dict(start)
    with torch.no_grad():
        for p, d in zip(weigh.parameters(), _directions(kind, rank, weigh), strict=True):
            p.add_(h * d)
    return LOOPS[kind](model, weigh, data, val)


_KINDS = list(LOOPS)


@pytest.mark.parametrize("kinds", [_KINDS[:3], _KINDS[3:6], _KINDS[6:9], _KINDS[9:]], ids="-".join)
def test_as_eager(kinds: list[str]) -> None:
    for found in alike(run(2, _job, kinds)):
        for kind, gap, slopes in found:
            assert gap < 1e-12, (kind, gap)
            for got, want in slopes:
                assert abs(got - want) < 1e-7 * abs(want), (kind, got, want)


# ---- what is refused


def _never(model: Any, weigh: Any, data: Any, val: Any) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in data:
        with model.no_sync():
            opt.zero_grad()
            weighted(model, weigh, x, y).backward()
        opt.step()
    return F.cross_entropy(model(val[0]), val[1])


def _refused_job(rank: int, n: int) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.distributed.fsdp import fully_shard

    def tried(loop: Any, model: Any) -> Any:
        _, weigh, data, val = _make("plain", rank, n)
        try:
            mlc.compile(loop)(model, weigh, data, val)
        except mlc.MlcError as e:
            return type(e).__name__, str(e), e.loc is not None
        return "", "", False

    hooked = DistributedDataParallel(_network("plain"))
    hooked.register_comm_hook(None, fp16_compress_hook)
    sharded = _network("plain")
    fully_shard(sharded)
    return [
        tried(_plain, hooked), tried(_plain, DistributedDataParallel(_network("unused"))), tried(_plain, sharded),
        tried(_never, DistributedDataParallel(_network("plain"))),
    ]  # fmt: skip


def test_refused() -> None:
    words = ("communication hook", "does not reach b.weight", "fully_shard", "no backward yet")
    for found in alike(run(2, _refused_job)):
        for (kind, text, line), said in zip(found, words, strict=True):
            assert kind == "CaptureError", text
            assert said in text
            assert line
            assert "try: " in text
