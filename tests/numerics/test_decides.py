"""Optimizers and scalers that decide on values: line searches, skipped steps.  Each decision is a guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc
from tests.numerics.program import describe, same

H = 1e-5


def make(shift: float = 0.0, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    data = [(torch.randn(8, 4).double(), torch.randint(3, (8,))) for _ in range(4)]
    w = torch.zeros(8, dtype=torch.float64)
    along = torch.randn(8, dtype=torch.float64)
    return {"net": nn.Linear(4, 3).double(), "w": (w + shift * along).requires_grad_(), "data": data, "kept": {}}


def loss_of(net: nn.Module, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (w.sigmoid() * F.cross_entropy(net(x), y, reduction="none")).mean()


def lbfgs(line: str | None) -> Callable[..., Tensor]:
    def train(net, w, data, kept):
        kept["opt"] = opt = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4, history_size=3, line_search_fn=line)
        for x, y in data[:2]:

            def closure(x=x, y=y):
                opt.zero_grad()
                loss = loss_of(net, w, x, y)
                loss.backward()
                return loss

            opt.step(closure)
        return F.cross_entropy(net(data[0][0]), data[0][1])

    return train


def scaled(skips: bool) -> Callable[..., Tensor]:
    def train(net, w, data, kept):
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        kept["scaler"] = scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        for k, (x, y) in enumerate(data):
            opt.zero_grad()
            scaler.scale(loss_of(net, w, x, y) * (float("inf") if skips and k == 1 else 1.0)).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(net.parameters(), 0.3)
            scaler.step(opt)
            scaler.update()
        return F.cross_entropy(net(data[0][0]), data[0][1])

    return train


FORMS = {"lbfgs": lbfgs(None), "strong wolfe": lbfgs("strong_wolfe"), "scaler": scaled(False), "skips": scaled(True)}


def state(args: dict[str, Any]) -> Any:
    kept = args["kept"]
    scaler = kept["scaler"].state_dict() if "scaler" in kept else None
    found = kept["opt"].state_dict()["state"] if "opt" in kept else None
    return {"net": describe(args["net"]), "scaler": scaler, "opt": found}


@pytest.mark.parametrize("name", FORMS)
def test_every_call_is_the_loop(name: str) -> None:
    train = FORMS[name]
    compiled = mlc.compile(train)
    for seed in (0, 0, 1):
        args, plain = make(seed=seed), make(seed=seed)
        value = compiled(**args)
        same(describe(value.detach()), describe(train(**plain).detach()), "value", rel=1e-10)
        same(state(args), state(plain), "state", rel=1e-8)
        (got,) = torch.autograd.grad(value, [args["w"]])
        torch.manual_seed(seed)
        along = make(1.0, seed)["w"].detach()
        want = (train(**make(H, seed)).item() - train(**make(-H, seed)).item()) / (2 * H)
        assert (got @ along).item() == pytest.approx(want, rel=1e-5)


def test_without_running_such_decisions_are_refused() -> None:
    with pytest.raises(mlc.MlcError, match="LBFGS evaluates its closure") as e:
        mlc.trace(FORMS["lbfgs"], *make().values(), fake=True)
    assert "fake=True" in e.value.advice
