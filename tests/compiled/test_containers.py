"""Lists and dicts of the user's that hold batches, or look as if they did: what the loop does to them stays done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc

Batch = tuple[Tensor, Tensor]


def batches(n: int = 3) -> list[Batch]:
    return [(torch.randn(4, 3).double(), torch.randint(2, (4,))) for _ in range(n)]


def make() -> dict[str, Any]:
    torch.manual_seed(2)
    first = torch.zeros((), dtype=torch.float64)
    return {
        "net": nn.Linear(3, 2).double(), "w": torch.rand(4).double().requires_grad_(), "data": batches(),
        "log": [first, first.clone()], "box": {"data": batches(), "log": [first.clone()], "n": 1}, "rows": [batches(2)],
    }  # fmt: skip


def step(net: nn.Module, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    net.zero_grad()
    loss = (w * F.cross_entropy(net(x), y, reduction="none")).mean()
    loss.backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
    return loss.detach()


def appended(net, w, data, log, box, rows):
    for x, y in data:
        log.append(step(net, w, x, y))


def appended_in_a_dict(net, w, data, log, box, rows):
    for x, y in box["data"]:
        box["log"].append(step(net, w, x, y))


def entries_of_a_dict(net, w, data, log, box, rows):
    box["last"] = step(net, w, *box["data"][0])
    box["data"] = box["data"][1:]
    for x, y in box["data"]:
        step(net, w, x, y)


def extended(net, w, data, log, box, rows):
    log.extend(step(net, w, x, y) for x, y in data)
    log += [log[0]]


def cleared(net, w, data, log, box, rows):
    log.clear()
    for x, y in data:
        log.insert(0, step(net, w, x, y))
    log.pop()


def nested(net, w, data, log, box, rows):
    for row in rows:
        for x, y in row:
            step(net, w, x, y)
    rows[0] = data
    rows.append(data[:1])


FORMS: list[Callable[..., None]] = [appended, appended_in_a_dict, entries_of_a_dict, extended, cleared, nested]


def flat(x: Any, at: str = "") -> dict[str, Any]:
    """Everything in nested containers, by place."""
    if isinstance(x, Tensor):
        return {at: x.detach().clone()}
    if isinstance(x, nn.Module):
        return flat(dict(x.named_parameters()), at)
    if isinstance(x, dict):
        found = [flat(v, f"{at}.{k}") for k, v in x.items()]
    elif isinstance(x, (list, tuple)):
        found = [flat(v, f"{at}.{i}") for i, v in enumerate(x)] + [{f"{at}.length": len(x)}]
    else:
        return {at: x}
    return {k: v for part in found for k, v in part.items()}


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_every_call_leaves_what_the_loop_leaves(form: Callable[..., None]) -> None:
    def train(net: Any, w: Any, data: Any, log: Any, box: Any, rows: Any) -> Tensor:
        form(net, w, data, log, box, rows)
        return F.cross_entropy(net(data[0][0]), data[0][1])

    compiled = mlc.compile(train)
    mine, plain = make(), make()
    kept = {k: id(v) for k, v in mine.items()}
    for _ in range(3):
        (got,) = torch.autograd.grad(compiled(**mine), [mine["w"]])
        train(**plain)
        left, wanted = flat(mine), flat(plain)
        assert left.keys() == wanted.keys()
        for k, v in wanted.items():
            torch.testing.assert_close(left[k], v, rtol=1e-10, atol=1e-12, msg=lambda m, k=k: f"{k}: {m}")
        assert got.abs().max() > 0
    assert {k: id(v) for k, v in mine.items()} == kept


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_a_failing_call_leaves_everything_as_it_was(form: Callable[..., None]) -> None:
    def train(net: Any, w: Any, data: Any, log: Any, box: Any, rows: Any) -> Tensor:
        form(net, w, data, log, box, rows)
        raise KeyError("the user's own")

    args = make()
    before = flat(args)
    with pytest.raises(KeyError):
        mlc.compile(train)(**args)
    left = flat(args)
    assert left.keys() == before.keys()
    for k, v in before.items():
        torch.testing.assert_close(left[k], v, rtol=0, atol=0)
    assert all(type(x) is list for x in (args["data"], args["log"], args["box"]["data"], args["rows"][0]))
