"""The reweighting of reweighting.py as two problems instead of a loop.

The lower level trains a network on digits of which forty percent carry a wrong label, with a weight for every sample;
the upper level trains these weights by the loss on a hundred clean samples. Who reads whom is found; the loop that the
levels stand for (`print(training.source)`) is the one of reweighting.py, and so is its gradient.
(Ren et al.: Learning to reweight examples for robust deep learning, 2018.)

    mlc run examples/reweighting_levels.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mlc


def problems(x, y, val_x, val_y, seed=0):
    """The levels, the network and the logits of the samples' weights."""
    torch.manual_seed(seed)
    model, logits = make_net(), torch.zeros(len(y), requires_grad=True)

    def weighted(batch):
        index, x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (torch.sigmoid(logits[index]) * losses).mean()

    def batches():
        for index in torch.randperm(len(y))[:500].split(100):
            yield index, x[index], y[index]

    def clean():
        return F.cross_entropy(model(val_x), val_y)

    lower = mlc.Level("net", model, lambda p: torch.optim.Adam(p, lr=3e-3, eps=1e-5), weighted, batches, steps=5)
    upper = mlc.Level("weights", logits, torch.optim.Adam([logits], lr=0.3), clean)
    return [lower, upper], model, logits


def make_net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def load(noise=0.4, train=1000, val=100, seed=0):
    """(training samples, noisy labels, which are noisy), clean samples for validation, a test set."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    noisy = torch.rand(train) < noise
    noisy_y = torch.where(noisy, (y[:train] + torch.randint(1, 10, (train,))) % 10, y[:train])
    end = train + val
    return (x[:train], noisy_y, noisy), (x[train:end], y[train:end]), (x[end:], y[end:])


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def example_training():
    (x, y, _), val, _ = load()
    return mlc.Training(problems(x, y, *val)[0])


def main(steps=100, seed=0):
    (x, y, noisy), val, test = load(seed=seed)
    levels, model, logits = problems(x, y, *val, seed)
    training = mlc.Training(levels, logger=mlc.training.Stdout(every=20))
    training.run(steps, valid=lambda: {"accuracy": accuracy(model, *test)}, valid_every=20)
    weights = torch.sigmoid(logits).detach()
    result = {
        "mean weight, clean samples": weights[~noisy].mean().item(),
        "mean weight, noisy samples": weights[noisy].mean().item(),
        "test accuracy": accuracy(model, *test),
    }
    for name, value in result.items():
        print(f"{name:40s}{value:.3f}")
    return result


if __name__ == "__main__":
    main()
