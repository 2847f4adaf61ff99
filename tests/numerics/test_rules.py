"""The rules of the reference are torch.optim's updates, to the last digits, over several steps."""

import pytest
import torch

from tests.numerics.optimizers import OPTIMIZERS
from tests.numerics.rules import RULES, hyper, safe_norm, safe_sqrt

SHAPES = [(3, 4), (5,), (2, 3, 2)]
STEPS = 12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rule_is_the_step_of_torch(name: str) -> None:
    cls, given = OPTIMIZERS[name]
    params = [torch.randn(s).requires_grad_() for s in SHAPES]
    mine, state = [p.detach().clone() for p in params], [{} for _ in params]
    opt = cls(params, **given)
    for _ in range(STEPS):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p) + p.detach()
            mine[i], state[i] = RULES[cls](mine[i], p.grad.clone(), state[i], hyper(cls, given))
        opt.step()
        for a, p in zip(mine, params, strict=True):
            torch.testing.assert_close(a, p.detach(), rtol=1e-12, atol=1e-13)
    for s, p in zip(state, params, strict=True):
        for key, value in opt.state[p].items():
            torch.testing.assert_close(torch.as_tensor(s[key]).to(value), value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rule_has_a_finite_derivative_at_a_zero_gradient(name: str) -> None:
    cls, given = OPTIMIZERS[name]
    p, state = torch.randn(3, 2), {}
    start = p.clone().requires_grad_()
    g = torch.zeros(3, 2, requires_grad=True)
    q = start
    for _ in range(3):
        q, state = RULES[cls](q, g, state, hyper(cls, given))
    for d in torch.autograd.grad(q.sum(), [start, g]):
        assert d.isfinite().all()


def test_roots_are_flat_at_zero() -> None:
    x = torch.zeros(2, requires_grad=True)
    (safe_sqrt(x).sum() + safe_norm(x)).backward()
    assert x.grad is not None and torch.equal(x.grad, torch.zeros(2))
