"""Optimizers of the user's own, and those of torch that round or step by signs, against central differences.

`tests/numerics/test_optimizers.py` has the smooth ones of torch; together they are all that torch has.
"""

import contextlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import mlc
from tests.numerics.optimizers import OPTIMIZERS
from tests.numerics.reference import directional

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"


def of_the_page() -> dict[str, Any]:
    """The classes of docs/optimizers.md."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    classes = re.findall(r"^class .*?(?=^\S|\Z)", "\n".join(blocks), flags=re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {"torch": torch}
    for text in classes:
        exec(text, scope)
    return scope


class Heavy(Optimizer):
    """Momentum whose state is made by the first step, inside or outside of `no_grad`; takes a closure."""

    def __init__(self, params: Any, lr: Any, weight_decay: Any, outside: bool = False) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.9})
        self.outside = outside

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.outside and not self.state[p]:
                    self.state[p]["m"] = torch.zeros_like(p)
                with torch.no_grad():
                    if not self.state[p]:
                        self.state[p]["m"] = torch.zeros_like(p)
                    m = self.state[p]["m"]
                    m.mul_(group["momentum"]).add_(p.grad.tanh())
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(m, alpha=-group["lr"])
        return loss


class Early(Optimizer):
    """State made by the constructor, replaced by every step instead of written."""

    def __init__(self, params: Any, lr: Any, weight_decay: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.zeros(()), "v": torch.ones_like(p)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] += 1
                state["v"] = torch.lerp(state["v"], p.grad.square(), 0.2)
                p.data = p.data - group["lr"] * (
                    p.grad / (state["v"].sqrt() + 1 / state["step"]) + group["weight_decay"] * p
                )


class Sign(Optimizer):
    def __init__(self, params: Any, lr: Any, weight_decay: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad.sign())


DOCS = of_the_page()
OWN: dict[str, Callable[..., Optimizer]] = {
    "lazy state": Heavy,
    "lazy state outside of no_grad": lambda p, **given: Heavy(p, outside=True, **given),
    "state of the constructor": Early,
    "an option for each group": lambda p, lr, weight_decay: Heavy(
        [{"params": [x], "lr": lr * (i + 1)} for i, x in enumerate(p)], lr=lr, weight_decay=weight_decay
    ),
    "muon": DOCS["Muon"],
    "lion": DOCS["Lion"],
    "signs": Sign,
}
SIGNS = ("lion", "signs")


def arguments(along: Any = None, step: float = 0.0) -> dict[str, Any]:
    """Weights of samples, learning rate, decay, initial weights; moved by a step along a direction."""
    g = torch.Generator().manual_seed(3)
    batches = [(torch.randn(6, 3, generator=g), torch.randint(3, (6,), generator=g)) for _ in range(3)]
    learned = {
        "weights": torch.randn(6, generator=g),
        "lr": torch.tensor(0.05),
        "decay": torch.tensor(0.2),
        "start": torch.randn(4, 3, generator=g),
    }
    moved = {n: t + step * along[n] if along else t for n, t in learned.items()}
    return {**{n: t.requires_grad_() for n, t in moved.items()}, "batches": batches}


def training(make: Callable[..., Optimizer], closure: bool = False) -> Callable[..., Tensor]:
    def train(weights, lr, decay, start, batches):
        first, second = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.linspace(-1, 1, 12).sin().view(3, 4))
        first.data.copy_(start)
        opt = make([first, second], lr=lr, weight_decay=decay)
        for x, y in batches:

            def loss(x=x, y=y):
                opt.zero_grad()
                out = F.cross_entropy(torch.tanh(x @ first.T) @ second.T, y, reduction="none")
                value = (weights.sigmoid() * out).mean()
                value.backward()
                return value

            if closure:
                opt.step(loss)
            else:
                loss()
                opt.step()
        x, y = batches[0]
        return F.cross_entropy(torch.tanh(x @ first.T) @ second.T, y)

    return train


@contextlib.contextmanager
def told_of_signs(name: str) -> Iterator[None]:
    if name not in SIGNS:
        yield
        return
    with pytest.warns(mlc.SignWarning, match="gradient of weights is zero.*that of .*lr, decay") as told:
        yield
    assert len(told) == 1
    assert ("test_own_optimizers.py" if name == "signs" else "in step") in str(told[0].message)


@pytest.mark.parametrize("name", OWN)
def test_own_optimizers_are_differentiated(name: str) -> None:
    train = training(OWN[name], closure="lazy" in name)
    args = arguments()
    with told_of_signs(name):
        value = mlc.compile(train, backend="interpreter")(**args)
    torch.testing.assert_close(value.detach(), train(**arguments()).detach(), rtol=1e-11, atol=0)
    value.backward()
    assert bool(args["weights"].grad.any()) == (name not in SIGNS)
    for n in ("weights", "lr", "decay", "start"):
        along = {m: torch.zeros_like(args[m]) for m in ("weights", "lr", "decay", "start")}
        along[n] = torch.randn(args[n].shape, generator=torch.Generator().manual_seed(1))
        measured, _ = directional(lambda h, d=along: train(**arguments(d, h)).item())
        assert (args[n].grad * along[n]).sum().item() == pytest.approx(measured, rel=1e-6, abs=1e-9), n


def test_rprop_keeps_the_way_through_the_parameters() -> None:
    def train(weights, start, batches, **_):
        p = nn.Parameter(torch.zeros(4, 3))
        p.data.copy_(start)
        opt = torch.optim.Rprop([p], lr=0.05)
        for x, y in batches:
            opt.zero_grad()
            (weights.sigmoid() * F.cross_entropy(x @ p.T, y, reduction="none")).mean().backward()
            opt.step()
        return F.cross_entropy(batches[0][0] @ p.T, batches[0][1])

    args = arguments()
    with pytest.warns(mlc.SignWarning, match="gradient of weights is zero.*that of start"):
        value = mlc.compile(train, backend="interpreter")(**args)
    value.backward()
    assert not args["weights"].grad.any()
    along = {n: torch.zeros_like(args[n]) for n in ("weights", "lr", "decay", "start")}
    along["start"] = torch.randn(4, 3)
    measured, _ = directional(lambda h: train(**arguments(along, h)).item())
    assert (args["start"].grad * along["start"]).sum().item() == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_muon_of_torch_has_the_loops_values_and_says_what_it_rounds(learned: bool) -> None:
    def make(params, lr, weight_decay):
        return torch.optim.Muon(params, lr=lr if learned else 0.05, weight_decay=weight_decay if learned else 0.2)

    args, own = arguments(), arguments()
    with pytest.warns(mlc.PrecisionWarning, match="computes in bfloat16") as told:
        value = mlc.compile(training(make), backend="interpreter")(**args)
    assert len(told) == 1
    assert "test_own_optimizers.py" in str(told[0].message)
    torch.testing.assert_close(value.detach(), training(make)(**arguments()).detach(), rtol=1e-10, atol=0)
    value.backward()
    mlc.compile(training(DOCS["Muon"]), backend="interpreter")(**own).backward()
    for n in ("weights", "start", *(("lr", "decay") if learned else ())):
        cosine = F.cosine_similarity(args[n].grad.flatten(), own[n].grad.flatten(), dim=0)
        assert cosine > 0.95, n


def test_a_number_that_scales_a_narrower_tensor_scales_it_in_the_wider_dtype() -> None:
    """`add_(bfloat16, alpha=...)` computes in the dtype of the sum, also where alpha is learned or differs by step."""

    def train(lr, x):
        p = torch.ones(5)
        for k in range(4):
            step = (p * x).bfloat16()
            with torch.no_grad():
                p.add_(step, alpha=-lr)
            p.sub_(step, alpha=0.1 / (k + 3))
            p.addcmul_(step, step, value=0.01 * (k + 1))
        return p.sum()

    x = torch.linspace(0.1, 0.9, 5)
    lr = torch.tensor(0.0123, requires_grad=True)
    value = mlc.compile(train, backend="interpreter")(lr, x)  # which is verified against the run
    assert value.item() == pytest.approx(train(lr.detach(), x).item(), rel=1e-13)
    assert torch.autograd.grad(value, lr)[0].item() < 0


def test_no_optimizer_of_torch_is_forgotten() -> None:
    every = {x for x in vars(torch.optim).values() if inspect.isclass(x) and issubclass(x, Optimizer)} - {Optimizer}
    elsewhere = {torch.optim.LBFGS, torch.optim.SparseAdam}  # test_decides, test_errors
    here = {torch.optim.Muon, torch.optim.Rprop}
    assert every == {cls for cls, _ in OPTIMIZERS.values()} | elsewhere | here


def test_smooth_updates_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlc.compile(training(Heavy), backend="interpreter")(**arguments())


def test_a_class_that_is_first_used_in_the_call_is_recorded_once() -> None:
    """PyTorch wraps `step` of a class when its first instance is made: that is no change of the user's."""

    class Fresh(Heavy):
        def step(self, closure=None):
            return super().step(closure)

    def train(w):
        p = nn.Parameter(torch.ones(2))
        opt = Fresh([p], lr=0.1, weight_decay=0.0)
        for _ in range(2):
            opt.zero_grad()
            (w * p.square()).sum().backward()
            opt.step()
        return p.sum()

    compiled = mlc.compile(train, backend="interpreter")
    values = [compiled(torch.ones(2, requires_grad=True)).item() for _ in range(2)]
    assert values[0] == pytest.approx(values[1], rel=1e-14)
    assert compiled.recordings == 1
