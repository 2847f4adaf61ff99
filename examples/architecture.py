"""Search an architecture by gradient, with roll-back (DARTS), and hold it against all of them.

Two places of a small network can each be one of three operations, of which one keeps the digits' shape and others do
not. During the search each place is a mixture by softmax(alpha). One step: the weights take a virtual step; alpha gets
the gradient of the validation loss *through* it; the weights go back (`rollback=True`) and take the step again with the
new alpha. There are only nine architectures, so each one is trained on its own as well, to see which are good.
(Liu, Simonyan, Yang: DARTS, 2019, second-order version, algorithm 1.)

    mlc run examples/architecture.py
"""

import itertools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mlc

CHOICES = ("conv 3x3", "conv 1x1", "mean of all pixels")


class Mean(nn.Module):
    """Every pixel becomes the mean of all: the shape is lost."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True).expand_as(x)


def make_choices(channels=8):
    same = {"padding": "same", "bias": False}
    return nn.ModuleList([nn.Conv2d(channels, channels, 3, **same), nn.Conv2d(channels, channels, 1, **same), Mean()])


class Net(nn.Module):
    """Two places with a mixture of operations each; ``alpha``: logits, one row for each place."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 1)
        self.places = nn.ModuleList(make_choices(channels) for _ in range(2))
        self.head = nn.Linear(channels * 4, 10)

    def forward(self, x, weights):
        x = self.stem(x)
        for place, row in zip(self.places, weights, strict=True):
            x = torch.tanh(sum(w * choice(x) for w, choice in zip(row, place, strict=True)))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def problems(train, val, seed=0):
    """The levels, and alpha."""
    torch.manual_seed(seed)
    net, alpha = Net(), torch.zeros(2, len(CHOICES), requires_grad=True)

    def loss(batch):
        x, y = batch
        return F.cross_entropy(net(x, alpha.softmax(1)), y)

    weights = mlc.Level("net", net, sgd, loss, train, rollback=True, clip=5.0)
    search = mlc.Level("alpha", alpha, torch.optim.Adam([alpha], lr=0.05), loss, val)
    return [weights, search], alpha


def train_alone(architecture, batches, steps, seed=0):
    """One architecture from scratch."""
    torch.manual_seed(seed)
    net, chosen = Net(), F.one_hot(torch.tensor(architecture), len(CHOICES)).float()
    opt = sgd(net.parameters())
    for x, y in itertools.islice(itertools.cycle(batches), steps):
        opt.zero_grad()
        F.cross_entropy(net(x, chosen), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        opt.step()
    return lambda x: net(x, chosen)


def load(seed=0):
    """Batches for the weights, batches for alpha, and a test set."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    parts = [list(zip(x[a : a + 600].split(60), y[a : a + 600].split(60), strict=True)) for a in (0, 600)]
    return parts[0], parts[1], (x[1200:], y[1200:])


def example_training():
    train, val, _ = load()
    small = [[(x[:10], y[:10]) for x, y in part] for part in (train, val)]
    return mlc.Training(problems(*small)[0])


def main(steps=150, alone=150, seed=0):
    train, val, (x, y) = load(seed)
    levels, alpha = problems(train, val, seed)
    mlc.Training(levels).run(steps)
    found = tuple(alpha.argmax(1).tolist())
    accuracies = {}
    for architecture in itertools.product(range(len(CHOICES)), repeat=2):
        net = train_alone(architecture, train, alone, seed)
        with torch.no_grad():
            accuracies[architecture] = (net(x).argmax(1) == y).float().mean().item()
    for architecture in sorted(accuracies, key=accuracies.__getitem__, reverse=True):
        names = ", ".join(CHOICES[k] for k in architecture)
        print(f"{accuracies[architecture]:.3f}  {names}{'  <- found' if architecture == found else ''}")
    return {"found": found, "alpha": alpha.softmax(1).tolist(), "accuracies": accuracies}


if __name__ == "__main__":
    main()
