"""Which updates are warned of: by a sign on the way from a gradient to a parameter, or rounded there; nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mlc

Update = Callable[[Tensor, Tensor], None]


def warned(update: Update, loss: Callable[[Tensor], Tensor] = torch.square, dtype: torch.dtype = torch.float32) -> list:
    """Warnings of three steps by hand; the meta-parameters are a weight in the loss and one in the result."""

    def train(w, v, rate):
        p = nn.Parameter(torch.ones(3, dtype=dtype))
        for _ in range(3):
            (g,) = torch.autograd.grad((w * loss(p)).sum(), p)
            with torch.no_grad():
                update(p, rate * g)
        return (v * p).sum()

    learned = [torch.full((3,), 0.1, requires_grad=True) for _ in range(3)]
    return list(mlc.trace(train, *learned).warnings)


def test_a_sign_of_the_gradient() -> None:
    def by_sign(p, g):
        p.sub_(0.1 * g.sign() + 0.01 * p)

    (told,) = warned(by_sign)
    assert isinstance(told, mlc.SignWarning)
    said = str(told)
    assert "test_updates.py:" in said
    assert "The gradient of w, rate is zero." in said
    assert "that of v" in said


def test_a_sign_beside_the_gradient_leaves_a_way() -> None:
    def both(p, g):
        p.sub_(0.1 * g.sign() + g)

    (told,) = warned(both)
    assert "is zero." not in str(told)
    assert "that of w, rate, v" in str(told)


def low(p: Tensor, g: Tensor) -> None:
    p.sub_(g.bfloat16())


def test_a_rounded_update() -> None:
    (told,) = warned(low)
    assert isinstance(told, mlc.PrecisionWarning)
    assert "computes in bfloat16" in str(told)


def attacked(p: Tensor) -> Tensor:
    """A loss at inputs moved by the sign of a gradient, which the user cuts."""
    x = torch.ones(3, requires_grad=True)
    (s,) = torch.autograd.grad((p * x).square().sum(), x)
    return (p * (x + 0.1 * s.sign()).detach()).square()


SILENT: dict[str, tuple[Update, dict]] = {
    "a sign of the parameter": (lambda p, g: p.sub_(g + 0.01 * p.sign()), {}),
    "a sign in the loss": (lambda p, g: p.sub_(g), {"loss": lambda p: p.sign() * p}),
    "an attack by signs that is cut": (lambda p, g: p.sub_(g), {"loss": attacked}),
    "parameters that are themselves low": (lambda p, g: p.sub_(g.float().bfloat16()), {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("name", SILENT)
def test_nothing_to_warn_of(name: str) -> None:
    update, given = SILENT[name]
    assert warned(update, **given) == []
