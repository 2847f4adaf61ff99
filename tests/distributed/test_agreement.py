"""Processes that run one compiled function agree: on the program, on the turn, and on what went wrong."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import mlc
from tests.distributed.loops import batches, models, weighted
from tests.distributed.world import Left, alike, run


def _loop(model: Any, weigh: Any, data: Any, val: Any, bias: Any = None) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in data:
        opt.zero_grad()
        weighted(model, weigh, x, y).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        if bias is not None and bias.sum().item() > 0:
            model[0].bias.grad.mul_(2)
        opt.step()
    return F.cross_entropy(model(val[0]), val[1])


def _same(rank: int, n: int, cf: Any, change: Any = None, bias: Any = None) -> float:
    """How far a compiled call is from the plain one: value, state; and whether the gradient is there."""
    out = []
    for fn in (cf, _loop):
        model, weigh = models()
        data, val = batches(rank, n)
        data = data if change is None else change(data)
        loss = fn(model, weigh, data, val, bias)
        loss.backward()
        out.append([loss.detach(), *[p.detach() for p in model.parameters()]])
        if fn is cf:
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weigh.parameters())
    return max(float((a - b).abs().max()) for a, b in zip(*out, strict=True))


def _changing(rank: int, n: int) -> Any:
    cf = mlc.compile(_loop)
    gaps = [_same(rank, n, cf, bias=torch.ones(2))]
    gaps.append(_same(rank, n, cf, bias=torch.ones(2)))
    first = cf.recordings
    gaps.append(_same(rank, n, cf, bias=torch.ones(2) * (1 - 2 * rank)))  # a guard fails on rank 1 only
    second = cf.recordings
    shorter = (lambda d: [(x[:-1], y[:-1]) for x, y in d]) if rank == 1 else None
    gaps.append(_same(rank, n, cf, shorter, torch.ones(2)))  # other shapes on rank 1 only
    return gaps, first, second, cf.recordings


@pytest.mark.slow
def test_where_one_process_finds_another_call_all_record() -> None:
    for gaps, first, second, third in alike(run(2, _changing)):
        assert max(gaps) < 1e-12
        assert (first, second, third) == (1, 2, 3)


def _refusing(rank: int, n: int) -> Any:
    """One bad call after the other: each ends with an error on every process that could know."""
    out = []
    for which in (_one_branch, _other_shapes, _other_order, _one_result, _failing, _fewer):
        model, weigh = models()
        data, val = batches(rank, n)
        before = [p.clone() for p in model.parameters()]
        try:
            mlc.compile(which)(model, weigh, data, val, rank)
            out.append(("", "", False))
        except (mlc.MlcError, ValueError) as e:
            out.append((type(e).__name__, str(e), getattr(e, "loc", None) is not None))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), which
        dist.barrier()
    return out


def _step(model: nn.Module, weigh: Any, data: Any) -> Any:
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in data:
        opt.zero_grad()
        loss = weighted(model, weigh, x, y)
        loss.backward()
        yield loss.detach().clone()
        opt.step()


def _one_branch(model: Any, weigh: Any, data: Any, val: Any, rank: int) -> Tensor:
    for loss in _step(model, weigh, data):
        dist.all_reduce(loss)
        if rank == 0:
            dist.all_reduce(model[0].bias.grad)
    return F.cross_entropy(model(val[0]), val[1])


def _other_shapes(model: Any, weigh: Any, data: Any, val: Any, rank: int) -> Tensor:
    for _ in _step(model, weigh, data):
        dist.all_reduce(torch.ones(2 + rank))
    return F.cross_entropy(model(val[0]), val[1])


def _other_order(model: Any, weigh: Any, data: Any, val: Any, rank: int) -> Tensor:
    for _ in _step(model, weigh, data):
        for p in list(model.parameters())[:: 1 - 2 * rank]:
            dist.all_reduce(p.grad)
    return F.cross_entropy(model(val[0]), val[1])


def _one_result(model: Any, weigh: Any, data: Any, val: Any, rank: int) -> Any:
    for loss in _step(model, weigh, data):
        dist.all_reduce(loss)
    return F.cross_entropy(model(val[0]), val[1]), (loss if rank == 0 else None)


def _failing(model: Any, weigh: Any, data: Any, val: Any, rank: int) -> Tensor:
    for loss in _step(model, weigh, data):
        if rank == 1:
            raise ValueError("mine")
        dist.all_reduce(loss)
    return F.cross_entropy(model(val[0]), val[1])


def _fewer(model: Any, weigh: Any, data: Any, val: Any, rank: int) -> Tensor:
    for _ in _step(model, weigh, data[rank:]):
        for p in model.parameters():
            dist.all_reduce(p.grad)
    return F.cross_entropy(model(val[0]), val[1])


@pytest.mark.slow
def test_programs_that_differ_are_an_error_on_every_process() -> None:
    zero, one = alike(run(2, _refusing, MLC_TIMEOUT="60"))
    for found in (zero, one):
        for i, (kind, text, line) in enumerate(found):
            if found is one and i == 4:
                assert (kind, text) == ("ValueError", "mine")
                continue
            assert kind == "CommunicationError", (i, kind, text)
            assert line, text
            assert "rank" in text
            assert "try: " in text
    assert "all_reduce(f64[5], sum)" in zero[0][1]
    assert "the end of the call" in zero[5][1] or "all_reduce" in zero[5][1]
    assert "ValueError: mine" in zero[4][1]
    assert "f64[2]" in zero[1][1]
    assert "f64[3]" in zero[1][1]
    assert "different programs" in zero[3][1]


def _lonely(rank: int, n: int) -> Any:
    """Rank 1 does not come to the second call."""
    cf = mlc.compile(_loop)
    _same(rank, n, cf)
    if rank == 0:
        model, weigh = models()
        return cf(model, weigh, *batches(rank, n))
    return None


def test_a_process_that_does_not_come_is_an_error() -> None:
    found = run(2, _lonely, MLC_TIMEOUT="5")
    assert isinstance(found[0], Left)
    assert found[0].kind == "CommunicationError", str(found[0])
    assert "every process has to call it alike" in found[0].text


def _dying(rank: int, n: int, when: str) -> Any:
    cf = mlc.compile(_loop)
    model, weigh = models()
    if when == "first call" and rank == 1:
        os._exit(1)
    loss = cf(model, weigh, *batches(rank, n))
    if rank == 1:
        os._exit(1)
    loss.backward()


def test_a_process_that_dies_takes_the_others_with_it() -> None:
    for when in ("first call", "backward"):
        found = run(2, _dying, when, MLC_TIMEOUT="5")
        assert isinstance(found[0], Left)
        assert found[0].kind == "CommunicationError", str(found[0])
        assert "rank 1" in found[0].text, found[0].text
        if when == "backward":  # they have met
            assert "has ended" in found[0].text, found[0].text


def _in_groups(rank: int, n: int) -> Any:
    """The group is an argument, and another one later; a later call may not use the first one's."""
    from tests.distributed.loops import summed

    def loop(model: Any, weigh: Any, data: Any, val: Any, group: Any) -> Tensor:
        opt = torch.optim.SGD(model.parameters(), lr=0.2)
        for x, y in data:
            opt.zero_grad()
            weighted(model, weigh, x, y).backward()
            for p in model.parameters():
                dist.all_reduce(p.grad, group=group)
            opt.step()
        return F.cross_entropy(model(val[0]), val[1])

    both = dist.new_group([0, 1])
    own = [dist.new_group([r]) for r in range(n)][rank]
    cf = mlc.compile(loop)
    gaps = []
    for group in (both, own, both, None):
        values = []
        for fn in (cf, loop):
            model, weigh = models()
            loss = fn(model, weigh, *batches(rank, n), group)
            loss.backward()
            values.append([loss.detach(), *[p.detach() for p in model.parameters()]])
        gaps.append(max(float((a - b).abs().max()) for a, b in zip(*values, strict=True)))
    summed(loss)
    return gaps


def test_groups_are_read_at_every_call() -> None:
    for gaps in alike(run(2, _in_groups)):
        assert max(gaps) < 1e-12


def _checking(rank: int, n: int) -> str:
    model, weigh = models()
    try:
        mlc.check(_loop, model, weigh, *batches(rank, n))
    except mlc.CommunicationError as e:
        return str(e)
    return ""


def test_a_loop_that_communicates_is_checked_in_one_process() -> None:
    for text in alike(run(2, _checking)):
        assert "cannot be checked here" in text and "size 1" in text
