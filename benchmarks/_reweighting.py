"""Data reweighting on scikit-learn's digits, several ways: a conv net, and a net that weighs its training losses.

The lower level trains the conv net with SGD and momentum on digits of which two fifths carry a wrong label, every
example's loss weighed by a small perceptron that is given that loss (Shu et al. 2019, Meta-Weight-Net); the upper
level trains the perceptron with Adam by the loss on clean digits. One *outer step* is K inner steps, the
hypergradient and one step of Adam. Every way starts at the same values and sees the same batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mlc

LR, MOMENTUM, META_LR = 0.05, 0.9, 1e-3
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of the net and of batches."""

    width: int = 16
    batch: int = 64
    validation: int = 64
    hidden: int = 100


FULL, SMALL = Shape(), Shape(4, 8, 8, 4)


class Problem:
    """The two nets, their data and their losses.

    Attributes:
        net: What is trained.
        weigh: What weighs: (batch, 1) losses to (batch, 1) weights in (0, 1).
        train: Batches of (images, labels), some labels wrong.
        clean: Batches of the upper level.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        w = shape.width
        self.net = nn.Sequential(
            nn.Conv2d(1, w, 3, padding=1), nn.SiLU(), nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(32 * w, 10),
        ).to(dtype)  # fmt: skip
        self.weigh = nn.Sequential(nn.Linear(1, shape.hidden), nn.Tanh(), nn.Linear(shape.hidden, 1), nn.Sigmoid())
        self.weigh.to(dtype)
        found = load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(1))
        images = torch.tensor(found.images / 16, dtype=dtype)[order, None]
        labels = torch.tensor(found.target)[order]
        wrong = labels.clone()
        wrong[::5], wrong[1::5] = (wrong[::5] + 1) % 10, (wrong[1::5] + 3) % 10
        half = len(labels) // 2
        self.train = batches(images[:half], wrong[:half], shape.batch)
        self.clean = batches(images[half:], labels[half:], shape.validation)

    def lower(self, batch: Batch) -> Tensor:
        """The weighed training loss."""
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        weights = self.weigh(losses.detach()[:, None])[:, 0]
        return (weights * losses).mean()

    def upper(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def batches(images: Tensor, labels: Tensor, size: int) -> list[Batch]:
    whole = len(labels) // size * size
    pairs = zip(images[:whole].split(size), labels[:whole].split(size), strict=True)
    return [(x.clone(), y.clone()) for x, y in pairs]


@dataclass(frozen=True)
class Way:
    """One way to make outer steps.

    Attributes:
        advance: Makes one.
        optimizer: What steps the weighing net; its parameters' ``.grad`` holds the hypergradient at that time.
        facts: What the tool itself says.
    """

    advance: Callable[[], object]
    optimizer: torch.optim.Optimizer
    facts: Callable[[], dict[str, object]] = dict


def meta_optimizer(p: Problem) -> torch.optim.Optimizer:
    return torch.optim.Adam(p.weigh.parameters(), lr=META_LR)


def inner_optimizer(p: Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD(p.net.parameters(), lr=LR, momentum=MOMENTUM)


def compiled(p: Problem, steps: int, memory: int | str | None = None, backend: str = "auto") -> Way:
    """The plain loop under ``mlc.compile``."""
    opt, meta = inner_optimizer(p), meta_optimizer(p)
    train, clean = cycle(p.train), cycle(p.clean)

    @mlc.compile(memory=memory, backend=backend)
    def validate_after_training(batches: list[Batch], validation: Batch) -> Tensor:
        for batch in batches:
            opt.zero_grad()
            p.lower(batch).backward()
            opt.step()
        return p.upper(validation)

    def advance() -> None:
        loss = validate_after_training(drawn(train, steps), next(clean))
        meta.zero_grad()
        loss.backward()
        meta.step()

    return Way(advance, meta, lambda: said(validate_after_training))


def levels(p: Problem, steps: int, memory: int | str | None = None) -> Way:
    """The same as two levels of ``mlc.Training``."""
    inner = mlc.Level("net", p.net, inner_optimizer(p), p.lower, p.train, steps=steps)
    meta = meta_optimizer(p)
    training = mlc.Training([inner, mlc.Level("weigh", p.weigh, meta, p.upper, p.clean)], memory=memory)
    return Way(lambda: training.run(1), meta, lambda: said(training.function))


def said(f: "mlc.CompiledFunction") -> dict[str, object]:
    return {"planned_peak_bytes": f.plan.peak_bytes, "stages": f.report.stages}


def by_hand(p: Problem, steps: int) -> Way:
    """What people write without a library: SGD as expressions, ``create_graph=True``, values put back at the end."""
    meta = meta_optimizer(p)
    names, leaves = zip(*p.net.named_parameters(), strict=True)
    momenta = [torch.zeros_like(x) for x in leaves]
    train, clean = cycle(p.train), cycle(p.clean)
    lower, upper = pure(p, names)

    def advance() -> None:
        values = [x.detach().requires_grad_() for x in leaves]
        moving = list(momenta)
        for batch in drawn(train, steps):
            grads = torch.autograd.grad(lower(values, batch), values, create_graph=True)
            moving = [MOMENTUM * m + g for m, g in zip(moving, grads, strict=True)]
            values = [x - LR * m for x, m in zip(values, moving, strict=True)]
        meta.zero_grad()
        upper(values, next(clean)).backward(inputs=list(p.weigh.parameters()))
        with torch.no_grad():
            for into, x in zip((*leaves, *momenta), (*values, *moving), strict=True):
                into.copy_(x)
        meta.step()

    return Way(advance, meta)


def pure(p: Problem, names: tuple[str, ...]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The two losses as functions of the net's values."""

    class Called(nn.Module):
        def __init__(self, loss: Callable[[Batch], Tensor]) -> None:
            super().__init__()
            self.net, self.loss = p.net, loss

        def forward(self, batch: Batch) -> Tensor:
            return self.loss(batch)

    def function(loss: Callable[[Batch], Tensor]) -> Callable[..., Tensor]:
        module = Called(loss)
        return lambda values, batch: torch.func.functional_call(
            module, {f"net.{n}": v for n, v in zip(names, values, strict=True)}, (batch,)
        )

    return function(p.lower), function(p.upper)


def drawn(data: Iterator[Batch], steps: int) -> list[Batch]:
    return [next(data) for _ in range(steps)]
