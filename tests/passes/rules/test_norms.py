"""Third derivatives: a gradient penalty inside an inner loss, against central differences of the eager loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import mlc
from mlc.ir.builder import Builder
from mlc.ir.types import TensorType
from mlc.passes.autodiff.adjoint import Policy
from mlc.passes.autodiff.forward import pushforward
from mlc.passes.autodiff.program import differentiate
from mlc.passes.autodiff.reverse import pullback
from mlc.passes.rules import legality
from mlc.passes.rules import recorded as rules
from mlc.runtime.interpreter.interpreter import compile_region

STEPS = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


def det(h: Tensor) -> Tensor:
    a = h.reshape(-1, 2, 2)
    return torch.linalg.det(a @ a.mT + torch.eye(2, dtype=h.dtype))


def singular(h: Tensor) -> Tensor:
    """Matrices of rank 2 whatever the weights are: their determinants are 0, their adjugates are not."""
    a = h.reshape(-1, 4)
    b = a.roll(1, 1).sin()
    m = a[:, :3, None] * b[:, None, :3] + b[:, :3, None] * a[:, None, 1:]
    return torch.linalg.det(m) + torch.linalg.det(m + torch.ones(3, 3))


KINDS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "layer": lambda: nn.LayerNorm(4),
    "layer_plain": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "batch": lambda: nn.BatchNorm1d(4),
    "batch_plain": lambda: nn.BatchNorm1d(4, affine=False),
    "batch_untracked": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "batch_eval": lambda: nn.BatchNorm1d(4).eval(),
    "batch_2d": lambda: nn.Sequential(nn.Unflatten(1, (2, 1, 2)), nn.BatchNorm2d(2), nn.Flatten()),
    "group": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.GroupNorm(2, 2), nn.Flatten()),
    "instance": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.InstanceNorm1d(1), nn.Flatten()),
    "rms": lambda: nn.RMSNorm(4),
    "det": lambda: det,
    "det_singular": lambda: singular,
}


def program(kind: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """One training step on a gradient penalty: its hypergradient by ``s`` needs the third derivative of the layer."""
    torch.manual_seed(1)
    weight, x = torch.randn(4, 3), torch.randn(5, 3)
    op = KINDS[kind]()
    if isinstance(op, nn.Module):
        op.double()

    def train(s: Tensor) -> Tensor:
        w = weight.clone().requires_grad_()
        opt = torch.optim.SGD([w], lr=0.05)
        for _ in range(2):
            z = (x + s).requires_grad_()
            out = op((z @ w.T).tanh())
            (g,) = torch.autograd.grad((out * coefficients(out)).sum(), z, create_graph=True)
            opt.zero_grad()
            (g.square() * coefficients(g)).sum().backward()
            opt.step()
        out = op((x @ w.T).tanh())
        return (out.square() * coefficients(out)).sum()

    return train, torch.randn(5, 3) * 0.3


def coefficients(t: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)


def difference(f: Callable[[Tensor], Tensor], s: Tensor, along: Tensor) -> tuple[float, float]:
    """Derivative of ``f`` along a direction and how vague it is: the pair of steps that agrees best."""
    found = [((f(s + h * along) - f(s - h * along)) / (2 * h)).item() for h in STEPS]
    spread, value = min((abs(a - b), b) for a, b in pairwise(found))
    return value, spread


@pytest.fixture(autouse=True)
def double() -> object:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_inside_training_is_differentiated_right(kind: str) -> None:
    train, s = program(kind)
    along = torch.randn(s.shape)
    want, spread = difference(lambda t: train(t).detach(), s, along)
    s.requires_grad_()
    cf = mlc.compile(train)
    (g,) = torch.autograd.grad(cf(s), s)
    assert abs((g * along).sum().item() - want) <= max(1e-6 * abs(want), 5 * spread)


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_without_a_penalty_nothing_is_spelled_out(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the second derivative the program is the one that takes statistics for constants."""
    norm, x = KINDS[kind](), torch.randn(5, 4)
    eta = torch.tensor(0.1, requires_grad=True)
    assert isinstance(norm, nn.Module)

    def train() -> Tensor:
        opt = torch.optim.SGD(norm.parameters(), lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            norm(x * eta).square().sum().backward()
            opt.step()
        return norm(x).sin().sum()

    def operators() -> list[str]:
        return [str(e.op) for e in differentiate(mlc.trace(train), Policy(mode)).region.walk()]

    found = operators()
    monkeypatch.setattr(legality, "STATISTICS", {})
    monkeypatch.setattr(rules, "_CACHE", {})
    monkeypatch.setattr(rules, "_CARRYING", {})
    assert [o for o in found if "Loop" not in o] == [o for o in operators() if "Loop" not in o]


def test_an_evaluation_is_differentiated_in_its_running_statistics() -> None:
    """PyTorch has no such derivative; state that training wrote into the statistics needs it."""
    x, *rest = torch.randn(6, 3, 2), torch.randn(3), torch.randn(3), torch.randn(3), torch.rand(3) + 0.5
    b = Builder()
    ins = [b.input(TensorType.of(t)) for t in (x, *rest)]
    types = [TensorType.of(t) for t in (x, torch.zeros(0), torch.zeros(0))]
    outs = b.emit(torch.ops.aten.native_batch_norm.default, (*ins, False, 0.1, 1e-5), types)
    seed, tangent = b.input(TensorType.of(x)), [b.input(TensorType.of(t)) for t in rest[2:]]
    eqns = list(b.eqns)
    back = pullback(b, eqns, {outs[0]: seed}, ins[3:])
    forth = pushforward(b, eqns, dict(zip(ins[3:], tangent, strict=True)))
    region = b.region([*[back[v] for v in ins[3:]], forth[outs[0]]])

    def evaluation(mean: Tensor, var: Tensor) -> Tensor:
        w, bias = rest[:2]
        return (x - mean[:, None]) * torch.rsqrt(var[:, None] + 1e-5) * w[:, None] + bias[:, None]

    g, t = torch.randn(6, 3, 2), (torch.randn(3), torch.randn(3))
    want = torch.func.vjp(evaluation, *rest[2:])[1](g)
    want_t = torch.func.jvp(evaluation, tuple(rest[2:]), t)[1]
    got = compile_region(region, lambda e: None)([x, *rest, g, *t])
    for a, c in zip(got, (*want, want_t), strict=True):
        torch.testing.assert_close(a, c)
