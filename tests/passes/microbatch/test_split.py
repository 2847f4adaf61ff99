"""Micro-batches are exact: values and hypergradients equal those of the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc
from mlc.ir.core import Region
from mlc.ir.lowered.contract import Refused
from tests.passes.microbatch.splitting import both, error, is_split

Made = tuple[Callable[..., Any], tuple[Any, ...], list[Tensor]]
N, STEPS = 4, 2


def problem(model: Callable[[], nn.Module], loss: Callable[..., Tensor], data: Callable[[], tuple[Tensor, ...]],
            extra: Callable[[], list[Tensor]] = list) -> Made:  # fmt: skip
    """Adam on clones of a model; meta-parameters are its initial parameters and ``extra``."""
    torch.manual_seed(0)
    net = model().double()
    more = [t.requires_grad_() for t in extra()]
    batches = [data() for _ in range(STEPS)]
    val = data()

    def fn(net: nn.Module, batches: list[Any], val: Any) -> Tensor:
        fast = mlc.clone(net)
        opt = torch.optim.Adam(fast.parameters(), lr=0.01, eps=1e-3)
        for batch in batches:
            opt.zero_grad()
            loss(fast, *batch, *more).backward()
            opt.step()
        return fast(val[0]).square().mean()

    return fn, (net, batches, val), [*net.parameters(), *more]


def numbers(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def labels(*size: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, size)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def classified(**kw: Any) -> Callable[..., Tensor]:
    return lambda net, x, y: F.cross_entropy(net(x), y, **kw)


def pairs() -> tuple[Tensor, Tensor]:
    return numbers(N, 5), labels(N)


def regression() -> tuple[Tensor, Tensor]:
    return numbers(N, 5), numbers(N, 3)


def some_ignored() -> tuple[Tensor, Tensor]:
    x, y = pairs()
    y[1] = -100
    return x, y


WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


class ConvNet(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.norm, self.head = norm, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.silu(self.norm(self.one(x))), 2)
        return self.head(F.adaptive_avg_pool2d(torch.tanh(self.two(x)), 1).flatten(1))


def images() -> tuple[Tensor, Tensor]:
    return numbers(N, 2, 8, 8), labels(N)


class Transformer(nn.Module):
    """Tokens flattened behind the blocks, sequences first or batch first."""

    def __init__(self, norm: type[nn.Module], first: bool) -> None:
        super().__init__()
        self.first = first
        self.embed, self.positions = nn.Embedding(7, 8), nn.Parameter(0.1 * torch.randn(5, 8))
        self.norm, self.qkv, self.out = norm(8), nn.Linear(8, 24), nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x.transpose(0, 1) if self.first else x
        return self.out(x.reshape(-1, 8))


def tokens() -> tuple[Tensor, ...]:
    return (labels(N, 5, classes=7),)


def predicted(net: nn.Module, t: Tensor) -> Tensor:
    target = t.roll(-1, 1)
    return F.cross_entropy(net(t), (target.t() if net.first else target).reshape(-1))


class Eval(nn.Sequential):
    """Batch norm with running statistics that are not those of the data."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self[1].running_mean.fill_(0.3)
        self.eval()


def weighted(net: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (torch.sigmoid(w) * F.cross_entropy(net(x), y, reduction="none")).mean()


def normalised(net: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    share = torch.sigmoid(w)
    return (share / share.sum() * F.cross_entropy(net(x), y, reduction="none")).sum()


def picked(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return -net(x).log_softmax(1)[torch.arange(N), y].mean()


def gathered(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return -net(x).log_softmax(1).gather(1, y[:, None]).squeeze(1).mean()


def two_views(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Two views of each example behind one another in one batch; each pair is pulled together."""
    a, b = net(torch.cat([x, 0.9 * x])).chunk(2)
    return F.mse_loss(a, b) + F.cross_entropy(a, y)


def standard_inputs(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net((x - x.mean(0)) / x.std(0)), y)


def weights() -> list[Tensor]:
    return [numbers(N)]


PROBLEMS: dict[str, Callable[[], Made]] = {
    "mean": lambda: problem(mlp, lambda net, x, y: (net(x) - y).square().mean(), regression),
    "sum": lambda: problem(mlp, lambda net, x, y: (net(x) - y).square().sum(), regression),
    "mse": lambda: problem(mlp, lambda net, x, y: F.mse_loss(net(x), y), regression),
    "huber": lambda: problem(mlp, lambda net, x, y: F.smooth_l1_loss(net(x), y), regression),
    "bce": lambda: problem(
        mlp, lambda net, x, y: F.binary_cross_entropy_with_logits(net(x), y.sigmoid()), regression),
    "weights of examples": lambda: problem(mlp, weighted, pairs, weights),
    "normalised weights": lambda: problem(mlp, normalised, pairs, weights),
    "cross entropy": lambda: problem(mlp, classified(), pairs),
    "cross entropy, sum": lambda: problem(mlp, classified(reduction="sum"), pairs),
    "weighted classes": lambda: problem(mlp, classified(weight=WEIGHT), pairs),
    "ignored labels": lambda: problem(mlp, classified(), some_ignored),
    "ignored and weighted": lambda: problem(mlp, classified(weight=WEIGHT), some_ignored),
    "label smoothing": lambda: problem(mlp, classified(label_smoothing=0.1), pairs),
    "smoothing, weighted": lambda: problem(mlp, classified(label_smoothing=0.1, weight=WEIGHT), some_ignored),
    "picked": lambda: problem(mlp, picked, pairs),
    "gathered": lambda: problem(mlp, gathered, pairs),
    "two views": lambda: problem(mlp, two_views, pairs),
    "standardised inputs": lambda: problem(mlp, standard_inputs, pairs),
    "group norm": lambda: problem(lambda: ConvNet(nn.GroupNorm(2, 4)), classified(), images),
    "batch norm, eval": lambda: problem(Eval, classified(), pairs),
    "layer norm": lambda: problem(lambda: Transformer(nn.LayerNorm, False), predicted, tokens),
    "rms norm": lambda: problem(lambda: Transformer(nn.RMSNorm, False), predicted, tokens),
    "sequences first": lambda: problem(lambda: Transformer(nn.LayerNorm, True), predicted, tokens),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("k", [2, 4])
def test_parts_give_what_the_whole_batch_gives(name: str, k: int) -> None:
    one, parts, found = both(PROBLEMS[name], k)
    assert len(found) == 2 and all(isinstance(r, Region) and is_split(r) for r in found), found
    assert error(one, parts) < 1e-12


def unsplit(found: list[Region | Refused]) -> Refused:
    refused = [r for r in found if isinstance(r, Refused)]
    assert len(refused) == len(found) == 2
    return refused[-1]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    one, parts, found = both(PROBLEMS["cross entropy"], 3)
    assert "cannot be split into 3" in unsplit(found).reason
    assert error(one, parts) == 0.0


class Train(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # examples meet


class Composed(nn.Module):
    """Batch norm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        h = h - h.mean(0)  # examples meet
        return self.two(h.tanh())


def contrastive(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = net(x)
    return F.cross_entropy(z @ z.T, torch.arange(N))  # examples meet


def standardised(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(net(x), y, reduction="none")
    return ((losses - losses.mean()) / losses.std()).square().mean()  # examples meet


def worst(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y, reduction="none").max()  # examples meet


def trimmed(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(net(x), y, reduction="none")
    return losses.sort().values[:2].sum()  # examples meet


def spread(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(net(x), y, reduction="none")
    return losses.mean() + losses.var()  # examples meet


def ranked(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    score = net(x)[:, 0]
    return (score[:, None] - score).tanh().square().mean()  # examples meet


def normalised_by_model(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(net(x), y, reduction="none")
    return (torch.softmax(losses, 0) * losses).sum()  # examples meet


def next_example(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = net(x)
    return (z - z.roll(1, 0)).square().mean()  # examples meet


def mixed_up(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = net(x)
    return F.cross_entropy(z[torch.tensor([1, 0, 3, 2])], y) + z.square().mean()  # examples meet


REFUSED: dict[str, tuple[Callable[[], Made], str]] = {
    "batch norm": (lambda: problem(Train, classified(), pairs), "batch_norm"),
    "centred activations": (lambda: problem(Composed, classified(), pairs), "sub"),
    "contrastive": (lambda: problem(mlp, contrastive, pairs), "mm"),
    "standardised losses": (lambda: problem(mlp, standardised, pairs), "sub"),
    "largest loss": (lambda: problem(mlp, worst, pairs), "max"),
    "sorted losses": (lambda: problem(mlp, trimmed, pairs), "sort"),
    "variance of losses": (lambda: problem(mlp, spread, pairs), "sub"),
    "ranking": (lambda: problem(mlp, ranked, pairs), "sub"),
    "softmax of losses": (lambda: problem(mlp, normalised_by_model, pairs), "softmax"),
    "neighbours": (lambda: problem(mlp, next_example, pairs), "roll"),
    "other examples": (lambda: problem(mlp, mixed_up, pairs), "index"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_batches_whose_examples_meet_are_refused(name: str) -> None:
    make, operator = REFUSED[name]
    one, parts, found = both(make, 2)
    why = unsplit(found)
    assert operator in why.reason and "of 4" in why.reason, why
    assert why.loc is not None and "# examples meet" in why.loc.source(), why
    assert error(one, parts) == 0.0
