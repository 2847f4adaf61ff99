"""Small loops of every kind of level structure, and their programs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mlc


def data(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(5, 4), torch.randn(5)) for _ in range(n)]


def error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).squeeze(1) - y).square()


def two_levels() -> mlc.Program:
    def reweight(model, weigh, batches, val):
        opt = Adam(model.parameters(), lr=0.1, eps=1e-3)
        for x, y in batches:
            opt.zero_grad()
            (torch.sigmoid(weigh(x)).squeeze(1) * error(model, x, y)).mean().backward()
            opt.step()
        return error(model, *val).mean()

    return mlc.trace(reweight, nn.Linear(4, 1), nn.Linear(4, 1), data(), data(1)[0])


def three_levels() -> mlc.Program:
    def nested(model, reg, meta, batches, val):
        top = SGD([reg], lr=0.1)
        for _ in range(3):
            opt = Adam(model.parameters(), lr=0.1, eps=1e-3)
            with mlc.level("inner"):
                for x, y in batches:
                    opt.zero_grad()
                    (error(model, x, y).mean() + reg.exp() * model.weight.square().sum()).backward()
                    opt.step()
            top.zero_grad()
            (error(model, *val) * meta.exp()).mean().backward()
            top.step()
        return error(model, *val).mean()

    reg, meta = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(5))
    return mlc.trace(nested, nn.Linear(4, 1), reg, meta, data(4), data(1)[0])


def maml() -> mlc.Program:
    def adapt(model, tasks):
        total = 0.0
        for x, y in tasks:
            fast = mlc.clone(model)
            opt = SGD(fast.parameters(), lr=0.1)
            for _ in range(4):
                opt.zero_grad()
                error(fast, x, y).mean().backward()
                opt.step()
            total = total + error(fast, x, y).mean()
        return total

    return mlc.trace(adapt, nn.Linear(4, 1), data())


def learned_rates() -> mlc.Program:
    def rates(model, rate, batches, val):
        weights = list(model.parameters())
        for x, y in batches:
            loss = (model(x).squeeze(1) - y).square().mean()
            grads = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for w, g, r in zip(weights, grads, rate, strict=True):
                    w -= r.exp() * g
        return error(model, *val).mean()

    rate = [nn.Parameter(torch.zeros(1, 4)), nn.Parameter(torch.zeros(1))]
    return mlc.trace(rates, nn.Linear(4, 1), rate, data(), data(1)[0])


def one_path_stopped() -> mlc.Program:
    def stopped(model, weigh, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            w = weigh(x).squeeze(1)
            gate = w.detach()  # the stop
            (torch.sigmoid(w) * error(model, x, y) + gate * model(x).squeeze(1)).mean().backward()
            opt.step()
        return error(model, *val).mean()

    return mlc.trace(stopped, nn.Linear(4, 1), nn.Linear(4, 1), data(), data(1)[0])


def gradient_free() -> mlc.Program:
    def simulate(force, start):
        x, v = start
        for _ in range(6):
            v = v - 0.1 * torch.tanh(x * force)
            x = x + 0.1 * v
        return x.square().mean()

    return mlc.trace(simulate, nn.Parameter(torch.ones(3)), (torch.randn(3), torch.randn(3)))


def noisy() -> mlc.Program:
    """Draws: dropout, a generator of one's own, a loader that is shuffled."""

    def noisy(model, meta, g, dataset):
        opt = SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True)
        for x, y in loader:
            opt.zero_grad()
            x = nn.functional.dropout(x[0], 0.25) + meta * torch.randn(5, 4, generator=g)
            error(model, x, y[0]).mean().backward()
            opt.step()
        return error(model, torch.ones(5, 4), torch.ones(5)).mean() + 0 * meta

    return mlc.trace(noisy, nn.Linear(4, 1), nn.Parameter(torch.ones(())), torch.Generator(), data(6))


class Double(torch.autograd.Function):
    """A custom function with a rule of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g + 0 * x


def custom() -> mlc.Program:
    def custom(model, meta, batches):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            (Double.apply(model(x)).squeeze(1) - meta * y).square().mean().backward()
            opt.step()
        return error(model, *batches[0]).mean()

    return mlc.trace(custom, nn.Linear(4, 1), nn.Parameter(torch.ones(())), data())


ALL: dict[str, Callable[[], mlc.Program]] = {
    f.__name__: f
    for f in (two_levels, three_levels, maml, learned_rates, one_path_stopped, gradient_free, noisy, custom)
}
