"""Train an optimizer: a small network that turns gradients into updates, meta-trained by persistent evolution.

A network with one hidden layer is trained on scikit-learn's digits for sixty steps. Each parameter's update is
computed from three features of it (its gradient and two moving averages of that, each divided by a moving average of
its size) by a per-parameter network with 41 weights, after Metz et al. (2019). Those weights are the meta-parameters.
Sixty steps are unrolled in windows of five: persistent evolution strategies (Vicol et al. 2021) step on them after
every window, and still follow what they do to later ones. The opponent takes the same steps by SGD with momentum, its
rate the best of a grid.

    mlc run examples/learned_optimizer.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mlc

UNROLL, WINDOW, SIZE, HIDDEN = 60, 5, 50, 16
SHAPES = ((HIDDEN, 64), (HIDDEN,), (10, HIDDEN), (10,))


def loss_of(flat, x, y):
    parts = flat.split([torch.Size(s).numel() for s in SHAPES])
    w1, b1, w2, b2 = (p.view(s) for p, s in zip(parts, SHAPES, strict=True))
    return F.cross_entropy(F.linear(torch.tanh(F.linear(x, w1, b1)), w2, b2), y)


class LearnedOptimizer(nn.Module):
    """Features of a parameter to its update."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 8), nn.Linear(8, 1, bias=False)
        nn.init.zeros_(self.out.weight)  # at first the update is the faster average alone
        self.log_rate = nn.Parameter(torch.tensor(-3.5))
        self.register_buffer("slow", torch.tensor([0.9, 0.5]))

    def forward(self, gradient, state):
        """New state and update of a flat vector; ``state``: two averages of the gradient, one of its square."""
        decay = self.slow[:, None]
        averages = decay * state[:2] + (1 - decay) * gradient
        size = 0.95 * state[2] + 0.05 * gradient.square()
        features = torch.stack([gradient, *averages], 1) / (size + 1e-6).sqrt()[:, None]
        update = self.out(torch.tanh(self.hidden(features)))[:, 0] + 0.3 * features[:, 1]
        return torch.cat([averages, size[None]]), self.log_rate.exp() * update


def window(optimizer, flat, state, batches):
    """A few steps of the learned optimizer; the mean of the losses on the next batch after each."""
    total = 0.0
    with mlc.level("inner"):
        for (x, y), (next_x, next_y) in batches:
            (gradient,) = torch.autograd.grad(loss_of(flat, x, y), flat)
            new, update = optimizer(gradient, state)
            with torch.no_grad():
                state.copy_(new)
                flat.sub_(update)
            total = total + loss_of(flat, next_x, next_y)
    return total / len(batches)


train_window = mlc.compile(window, flows={"inner": mlc.Evolution(sigma=0.02, samples=8, persistent=True)})


def meta_train(optimizer, data, unrolls):
    """Adam on the weights of the optimizer, a step after every window."""
    meta_opt = torch.optim.Adam(optimizer.parameters(), lr=0.01)
    decay = torch.optim.lr_scheduler.LinearLR(meta_opt, 1.0, 1 / unrolls, unrolls)
    for _ in range(unrolls):
        flat, state = start()
        train_window.restart()
        for _ in range(UNROLL // WINDOW):
            meta_opt.zero_grad()
            train_window(optimizer, flat, state, draw_batches(data, WINDOW)).backward()
            nn.utils.clip_grad_norm_(optimizer.parameters(), 1.0)
            meta_opt.step()
        decay.step()


def evaluate(step, data, held_out, runs=10):
    """Loss on ``held_out`` over the steps of training runs that the meta-training has not seen: mean and last one."""
    torch.manual_seed(1)
    mean = last = 0.0
    for _ in range(runs):
        flat, state = start()
        for (x, y), _ in draw_batches(data, UNROLL):
            (gradient,) = torch.autograd.grad(loss_of(flat, x, y), flat)
            with torch.no_grad():
                state, update = step(gradient, state)
                flat -= update
                loss = loss_of(flat, *held_out).item()
            mean += loss / (runs * UNROLL)
        last += loss / runs
    return mean, last


def momentum(rate, decay):
    """SGD with momentum, in the form of the learned optimizer."""

    def step(gradient, state):
        first = decay * state[0] + gradient
        return torch.stack([first, state[1], state[2]]), rate * first

    return step


def start():
    """Fresh parameters and the state of an optimizer that has done nothing."""
    parts = [torch.randn(s) / 8 if len(s) == 2 else torch.zeros(s) for s in SHAPES]
    flat = nn.Parameter(torch.cat([p.reshape(-1) for p in parts]))
    return flat, torch.zeros(3, len(flat))


def load():
    """Training and test set of digits, standardised."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order], torch.tensor(labels)[order]
    x = (x - x[:1200].mean(0)) / x[:1200].std()
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def draw_batches(data, steps):
    """Pairs of batches: one to step on, one to be judged on."""
    x, y = data
    index = torch.randint(len(y), (steps, 2, SIZE))
    return [((x[i], y[i]), (x[j], y[j])) for i, j in index]


def example_args():
    torch.manual_seed(0)
    optimizer = LearnedOptimizer()
    return optimizer, *start(), draw_batches(load()[0], 2)


def main(unrolls=20, seed=0):
    torch.manual_seed(seed)
    data, test = load()
    optimizer = LearnedOptimizer()
    before = evaluate(optimizer, data, test)
    meta_train(optimizer, data, unrolls)
    grid = {(rate, decay): evaluate(momentum(rate, decay), data, data, runs=3)
            for rate in (0.1, 0.2, 0.5, 1.0, 2.0) for decay in (0.0, 0.5, 0.9)}  # fmt: skip
    rate, decay = min(grid, key=grid.__getitem__)
    result = {"learned, at first": before, "learned": evaluate(optimizer, data, test),
              "SGD": evaluate(momentum(rate, decay), data, test)}  # fmt: skip
    for name, (mean, last) in result.items():
        told = f" (rate {rate}, momentum {decay})" if name == "SGD" else ""
        print(f"{name + told:32s} test loss over {UNROLL} steps: mean {mean:.3f}, last {last:.3f}")
    return result


if __name__ == "__main__":
    main()
