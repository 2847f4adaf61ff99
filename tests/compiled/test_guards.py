"""A recording is used again only where everything that it read is as it was; what it gives is the caller's own."""

import sys

import pytest
import torch
from torch import Tensor, nn

import mlc
from mlc.passes.rolling import roll


def train(model: nn.Module, w: Tensor, data: list[Tensor], rate: float, twice: bool) -> tuple[Tensor, Tensor]:
    opt = torch.optim.SGD(model.parameters(), lr=rate)
    for x in data[: len(data) - 1]:
        opt.zero_grad()
        (model(x) * w).square().mean().backward()
        opt.step()
    out = model(data[-1]).sum() * w
    return out * 2 if twice else out, w


def fresh(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(3, 2).double(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)


def batches(n: int) -> list[Tensor]:
    return [torch.rand(4, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(n)]


def test_numbers_flags_and_lengths_count() -> None:
    cf = mlc.compile(train)
    for n, rate, twice in ((3, 0.1, False), (3, 0.1, False), (3, 0.2, False), (3, 0.1, True), (4, 0.1, False)):
        found, wanted = cf(*fresh(), batches(n), rate, twice), train(*fresh(), batches(n), rate, twice)
        torch.testing.assert_close(found[0].detach(), wanted[0].detach())
    assert cf.recordings == 4


def test_what_is_given_out_is_not_what_the_gradient_reads() -> None:
    """The exponential is a result, and its own derivative: a write to the result does not reach the hypergradient."""

    def both(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (w * x).exp()
        return y.sum(), y

    x = torch.rand(3, dtype=torch.float64)
    cf = mlc.compile(both)
    for _ in range(3):
        w = torch.ones(3, dtype=torch.float64, requires_grad=True)
        value, given = cf(w, x)
        with torch.no_grad():
            given.zero_()
        (g,) = torch.autograd.grad(value, w)
        torch.testing.assert_close(g, x * x.exp())


def test_two_objects_never_get_one_memory() -> None:
    """The last gradient becomes the momentum of the first step: two tensors of the user's, as PyTorch leaves them."""

    def once(p: nn.Parameter, w: Tensor, opt: torch.optim.Optimizer) -> Tensor:
        opt.zero_grad()
        (p * w).sin().sum().backward()
        opt.step()
        return (p * w).sum()

    cf = mlc.compile(once)
    for _ in range(3):
        p, w = nn.Parameter(torch.rand(3)), torch.rand(3, requires_grad=True)
        opt = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        cf(p, w, opt)
        assert p.grad is not None
        held = [p, p.grad, opt.state[p]["momentum_buffer"]]
        assert len({t.untyped_storage().data_ptr() for t in held}) == 3


def test_a_program_that_does_not_reproduce_the_run_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    true = roll.roll

    def wrong(eqns, *rest):
        return true([e.with_(args=(*e.args[:1], 0.3)) if "mul.Scalar" in str(e.op) else e for e in eqns], *rest)

    monkeypatch.setattr(sys.modules["mlc.trace.build"], "roll", wrong)
    w = torch.rand(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(mlc.VerifyError, match="does not reproduce"):
        mlc.compile(lambda w: torch.ops.aten.mul.Scalar(w.sin(), 0.5).sum())(w)
