"""`detach` and `no_grad` inside a loss mean the same under every response: a constant on its way into the loss.

The reference writes the stop into plain autograd.  The two responses that only see values cannot know of a cut, and
say so with its line.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mlc

D = torch.float64
STEPS, LR = 3, 0.2


def cut(w: Tensor, x: Tensor) -> Tensor:
    """The mean square of x w, one half of it detached, the other computed under ``no_grad``."""
    with torch.no_grad():
        half = 0.5 * (x @ w).square().mean()
    return half + 0.5 * (x @ w).square().mean().detach()


def loss(w: Tensor, eta: Tensor, x: Tensor, y: Tensor, stopped: Tensor) -> Tensor:
    """A ridge whose strength reads a value of the weights that is stopped, and is learned."""
    return (x @ w - y).square().mean() + (eta.exp() * (1 + 5 * stopped) * w.square()).sum()


def made(*, solved: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(*size, dtype=D, generator=generator) for size in ((6, 3), (6,)))
    w, eta = torch.full((3,), 0.3, dtype=D), torch.tensor([-2.0, -1.5, -0.8], dtype=D)
    for _ in range(400 * solved):
        w = w - 0.1 * torch.func.grad(loss)(w, eta, x, y, cut(w, x))
    return nn.Parameter(w), eta.requires_grad_(), x, y


def found(response: mlc.Response, *, solved: bool = False) -> Tensor:
    def train(w: Tensor, eta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        opt = torch.optim.SGD([w], lr=LR)
        with mlc.level("inner"):
            for _ in range(STEPS):
                opt.zero_grad()
                loss(w, eta, x, y, cut(w, x)).backward()
                opt.step()
        return (w - 1).square().sum()

    args = made(solved=solved)
    f = mlc.compile(train, backend="interpreter", flows={"inner": response})
    return torch.autograd.grad(f(*args), args[1])[0]


def unrolled(through: int, *, honour: bool = True) -> Tensor:
    """Through the last ``through`` steps; not honoured, the derivative of the values also goes through the stop."""
    w, eta, x, y = made()
    w = w.detach().clone().requires_grad_()
    for k in range(STEPS):
        if k == STEPS - through:
            w = w.detach().requires_grad_()
        value = (x @ w).square().mean()
        w = w - LR * torch.func.grad(loss)(w, eta, x, y, value.detach() if honour else value)
    return torch.autograd.grad((w - 1).square().sum(), eta)[0]


def implicit() -> Tensor:
    """-(dg/deta)' (dg/dtheta)^-T v at the solution, the stopped value a number."""
    w, eta, x, y = (t.detach() for t in made(solved=True))
    number = cut(w, x)
    h, m = torch.func.jacrev(lambda w, eta: torch.func.grad(loss)(w, eta, x, y, number), (0, 1))(w, eta)
    return -m.mT @ torch.linalg.solve(h.mT, 2 * (w - 1))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("response", "reference", "within"),
    [
        (mlc.Unroll(), lambda: unrolled(STEPS), 1e-12),
        (mlc.Truncated(2), lambda: unrolled(2), 1e-12),
        (mlc.FiniteDifference(), lambda: unrolled(STEPS), 1e-8),
        (mlc.ForwardGradient(100000), lambda: unrolled(STEPS), 0.02),
        (mlc.Implicit("cg", tol=1e-13), implicit, 1e-9),
        (mlc.Implicit("gmres", tol=1e-13), implicit, 1e-9),
        (mlc.Implicit("neumann", steps=3000, tol=1e-13), implicit, 1e-9),
        (mlc.Implicit("nystrom", steps=3, damping=1e-13), implicit, 1e-9),
    ],
    ids=lambda x: str(x) if isinstance(x, mlc.Response) else "",
)
def test_a_cut_is_a_constant(response: mlc.Response, reference: Callable[[], Tensor], within: float) -> None:
    solved = isinstance(response, mlc.Implicit)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlc.ResponseWarning)  # at a solution a last gradient is not below the first
        assert apart(found(response, solved=solved), reference()) < within


def test_the_stop_matters_here() -> None:
    assert apart(unrolled(STEPS, honour=False), unrolled(STEPS)) > 0.03


@pytest.mark.parametrize("response", [mlc.Evolution(1e-4, 2), mlc.FullyFirstOrder(1e4)], ids=str)
def test_what_only_sees_values_says_which_cut_it_goes_through(response: mlc.Response) -> None:
    with pytest.warns(mlc.MlcWarning, match=r"detach\(\) or no_grad\(\) at .*line \d+.*goes through it"):
        found(response)
