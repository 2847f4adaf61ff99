"""Evolution(persistent=True): unbiased over a whole unroll of windows, and what begins one."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlc

D = torch.float64
WINDOWS, STEPS = 3, 2
Made = tuple[Any, ...]


def window(w: Tensor, eta: Tensor, opt: Any, xs: list[Tensor]) -> Tensor:
    with mlc.level("inner"):
        for x in xs:
            opt.zero_grad()
            (0.5 * (w - x * eta).square().sum() + 0.05 * w.pow(4).sum()).backward()
            opt.step()
    return (w - 1).square().sum() + 0.2 * (eta * w).sum()  # eta reaches it beside the level, too


def made() -> Made:
    torch.manual_seed(0)
    w, eta = nn.Parameter(torch.full((2,), 0.5, dtype=D)), torch.tensor([0.7, -0.3], dtype=D, requires_grad=True)
    sgd = torch.optim.SGD([w], lr=0.1, momentum=0.3)  # it has state from the first step on: another structure
    return w, eta, sgd, [[torch.randn(2, dtype=D) for _ in range(STEPS)] for _ in range(WINDOWS)]


@pytest.fixture(scope="module")
def compiled() -> mlc.CompiledFunction:
    response = mlc.Evolution(sigma=1e-3, samples=40, persistent=True)
    cf = mlc.compile(window, backend="interpreter", flows={"inner": response})
    assert isinstance(cf, mlc.CompiledFunction)
    return cf


def unrolled() -> Tensor:
    """The gradient of the sum over all windows, by PyTorch's own graph of the formulas."""
    _, eta, _, windows = made()
    w, m = torch.full((2,), 0.5, dtype=D, requires_grad=True), torch.zeros(2, dtype=D)
    total = torch.zeros((), dtype=D)
    for xs in windows:
        for x in xs:
            loss = 0.5 * (w - x * eta).square().sum() + 0.05 * w.pow(4).sum()
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            m = 0.3 * m + g
            w = w - 0.1 * m
        total = total + (w - 1).square().sum() + 0.2 * (eta * w).sum()
    return torch.autograd.grad(total, eta)[0]


def test_it_is_unbiased_over_a_whole_unroll_where_truncation_is_not(compiled: mlc.CompiledFunction) -> None:
    exact = unrolled()
    found = []
    for _ in range(6):
        w, eta, sgd, windows = made()
        compiled.restart()
        for k, xs in enumerate(windows):
            state = torch.get_rng_state()
            loss = compiled(w, eta, sgd, xs)
            assert torch.equal(torch.get_rng_state(), state)  # directions come from elsewhere
            loss.backward()
            assert compiled.report is not None and compiled.report.windows == {"inner": k + 1}
        assert eta.grad is not None
        found.append(eta.grad)
    each = torch.stack(found)
    error = each.std(0) / len(found) ** 0.5
    assert ((each.mean(0) - exact).abs() < 3 * error).all()
    truncated = _truncated()
    assert ((truncated - exact).abs() > 3 * error).any()  # so the test could tell
    assert compiled.recordings == 2


def _truncated() -> Tensor:
    """The sum of exact gradients of each window alone: what estimates of windows have as their mean without memory."""
    w, eta, sgd, windows = made()
    plain = mlc.compile(window, backend="interpreter")
    for xs in windows:
        plain(w, eta, sgd, xs).backward()
    assert eta.grad is not None
    return eta.grad


def test_values_are_the_loops_own_and_no_gradient_is_needed(compiled: mlc.CompiledFunction) -> None:
    w, eta, sgd, windows = made()
    compiled.restart()
    with torch.no_grad():  # the particles go on all the same
        found = [compiled(w, eta, sgd, xs).item() for xs in windows]
    assert compiled.report is not None and compiled.report.windows == {"inner": WINDOWS}
    w, eta, sgd, windows = made()
    assert found == pytest.approx([window(w, eta, sgd, xs).item() for xs in windows], rel=1e-12)


def test_state_that_was_changed_from_outside_begins_a_new_unroll_and_is_said_once(
    compiled: mlc.CompiledFunction,
) -> None:
    w, eta, sgd, windows = made()
    compiled.restart()
    compiled(w, eta, sgd, windows[0])
    for again in (False, True):
        w.data.mul_(0.5)  # the version of a parameter does not tell
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled(w, eta, sgd, windows[1])
        said = [str(x.message) for x in caught if issubclass(x.category, mlc.MlcWarning)]
        assert bool(said) is not again and all("w was changed from outside" in s and "restart()" in s for s in said)
        assert compiled.report is not None and compiled.report.windows == {"inner": 1}
    eta.data.add_(0.1)  # a meta-parameter may move between windows: that is what they are for
    compiled(w, eta, sgd, windows[2])
    assert compiled.report.windows == {"inner": 2}


def test_what_cannot_be_carried_is_refused() -> None:
    response = mlc.Evolution(persistent=True)

    def stateless(eta: Tensor, xs: list[Tensor]) -> Tensor:
        w = torch.zeros(2, dtype=D, requires_grad=True)
        opt = torch.optim.SGD([w], lr=0.1)
        with mlc.level("inner", response=response):
            for x in xs:
                opt.zero_grad()
                (w - x * eta).square().sum().backward()
                opt.step()
        return w.sum()

    xs = [torch.ones(2, dtype=D)] * 2
    with pytest.raises(mlc.PlanError, match="goes on from no tensor that it changes"):
        mlc.compile(stateless, backend="interpreter")(torch.ones(2, dtype=D, requires_grad=True), xs)

    def given_back(w: Tensor, eta: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        opt = torch.optim.SGD([w], lr=0.1)
        with mlc.level("inner", response=response):
            for x in xs:
                opt.zero_grad()
                (w - x * eta - h).square().sum().backward()
                opt.step()
        return w.sum(), (h + w).detach()

    w, eta = nn.Parameter(torch.zeros(2, dtype=D)), torch.ones(2, dtype=D, requires_grad=True)
    cf = mlc.compile(given_back, backend="interpreter")
    _, h = cf(w, eta, torch.zeros(2, dtype=D))
    with pytest.raises(mlc.PlanError, match="a result of an earlier window is given back in"):
        cf(w, eta, h.detach())


def test_numbers_that_live_on_are_told_once() -> None:
    """Particles have no values of their own for them."""

    class Meter:
        average = 0.0

    def metered(w: Tensor, eta: Tensor, meter: Meter) -> Tensor:
        with mlc.level("inner"):
            (g,) = torch.autograd.grad((w * eta).square().sum(), w)
            with torch.no_grad():
                w.sub_(0.1 * g)
        loss = w.square().sum()
        meter.average = 0.9 * meter.average + 0.1 * loss.item()
        return loss

    cf = mlc.compile(metered, flows={"inner": mlc.Evolution(samples=2, persistent=True)}, backend="interpreter")
    w, eta = torch.ones(2, dtype=D, requires_grad=True), torch.ones(2, dtype=D, requires_grad=True)
    meter = Meter()
    with pytest.warns(mlc.MlcWarning, match=r"from window to window \(average\)"):
        cf(w, eta, meter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cf(w, eta, meter)
