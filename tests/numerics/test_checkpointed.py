"""Activation checkpointing in the loop: what it recomputes is the user's doing, state that it changes included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import mlc
from tests.numerics.program import describe, same

FORMS = {
    "by_name": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "by_module": lambda net, x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False),
    "reentrant": lambda net, x: checkpoint(net, x, use_reentrant=True),
    "to_the_end": lambda net, x: checkpoint(net, x, use_reentrant=False, early_stop=False),
    "pieces": lambda net, x: checkpoint_sequential(net, 2, x, use_reentrant=False),
}


class Averaging(nn.Module):
    """Keeps a running mean, as a plain buffer, which evaluation reads (`read`: training as well)."""

    def __init__(self, read: bool = False) -> None:
        super().__init__()
        self.read = read
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return x - self.mean if self.read else x
        return x - self.mean


def body(kind: str) -> nn.Sequential:
    middle = {"plain": nn.Tanh(), "norm": nn.BatchNorm1d(5), "dropout": nn.Dropout(0.4), "mean": Averaging(),
              "both": nn.Sequential(Averaging(), nn.Dropout(0.4)), "reads": Averaging(read=True)}[kind]  # fmt: skip
    return nn.Sequential(nn.Linear(3, 5), middle, nn.Tanh(), nn.Linear(5, 5), nn.ReLU()).double()


def make(kind: str, form: str, shift: float = 0.0) -> dict[str, Any]:
    torch.manual_seed(5)
    data = [(torch.randn(4, 3).double(), torch.randint(2, (4,))) for _ in range(3)]
    w = (torch.rand(4).double() + shift).requires_grad_()
    return {"net": body(kind), "head": nn.Linear(5, 2).double(), "w": w, "data": data, "form": form}


def loop(net: nn.Module, head: nn.Module, w: Tensor, data: list[Any], form: str) -> Tensor:
    opt = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1)
    for x, y in data:
        opt.zero_grad()
        hidden = FORMS[form](net, x.clone().requires_grad_() if form == "reentrant" else x)
        (w * F.cross_entropy(head(hidden), y, reduction="none")).mean().backward()
        opt.step()
    net.eval()
    return F.cross_entropy(head(net(data[0][0])), data[0][1])


CASES = [(k, f) for k in ("plain", "norm", "dropout", "mean", "both") for f in FORMS]
STATE = [(k, f) for k, f in CASES if f == "reentrant" and k in ("norm", "mean", "both")]


@pytest.mark.parametrize(("kind", "form"), [c for c in CASES if c not in STATE])
def test_every_call_is_the_loop(kind: str, form: str) -> None:
    compiled = mlc.compile(loop)
    for _ in range(2):
        args = make(kind, form)
        value = compiled(**args)
        plain = make(kind, form)
        same(describe(value), describe(loop(**plain)), "value", rel=1e-12)
        same(describe(args["net"]), describe(plain["net"]), "net", rel=1e-12)
        (got,) = torch.autograd.grad(value, [args["w"]])
        h = 1e-5
        up, down = (loop(**make(kind, form, s)).item() for s in (h, -h))
        assert got.sum().item() == pytest.approx((up - down) / (2 * h), rel=1e-6)
    assert compiled.recordings == 1


@pytest.mark.parametrize(("kind", "form"), STATE)
def test_state_in_a_reentrant_one_is_refused_and_the_advice_works(kind: str, form: str) -> None:
    args = make(kind, form)
    before = {n: v.clone() for n, v in args["net"].state_dict().items()}
    with pytest.raises(mlc.MlcError, match="reentrant checkpoint changes state") as e:
        mlc.compile(loop)(**args)
    assert "use_reentrant=False" in e.value.advice
    assert all(torch.equal(v, before[n]) for n, v in args["net"].state_dict().items())


@pytest.mark.parametrize("form", ["by_name", "by_module"])
def test_state_that_is_read_and_changed_is_refused(form: str) -> None:
    with pytest.raises(mlc.MlcError, match="reads state that it changes") as e:
        mlc.compile(loop)(**make("reads", form))
    assert e.value.loc is not None
    assert "backward()" in (e.value.loc.source() or "")


def test_data_that_requires_grad_in_the_loop_is_found_again() -> None:
    """`requires_grad_()` on what a list of batches holds: later calls have such a list as well."""

    def marking(net: nn.Module, head: nn.Module, w: Tensor, data: list[Any], form: str) -> Tensor:
        for x, _ in data:
            x.requires_grad_()
        return loop(net, head, w, data, form)

    compiled = mlc.compile(marking)
    for _ in range(3):
        compiled(**make("plain", "by_name"))
    assert compiled.recordings == 1
