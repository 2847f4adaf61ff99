"""Learn which training labels to trust.

Forty percent of the training labels of scikit-learn's digits are replaced by a wrong digit. Every
training sample gets a weight, sigmoid(logit), and the logits are meta-parameters: after each window
of five ordinary training steps the loss on a hundred clean samples is differentiated *through* those
steps, and the weights of the samples that led the network astray go down.

    mlc run examples/reweighting.py
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mlc


@mlc.compile
def validate_after_training(model, opt, logits, batches, val_x, val_y):
    """An ordinary training loop over batches of (index, x, y), then the loss on clean samples."""
    for index, x, y in batches:
        opt.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        (torch.sigmoid(logits[index]) * losses).mean().backward()
        opt.step()
    return F.cross_entropy(model(val_x), val_y)


def train_reweighted(data, windows, seed=0):
    """One training run of ``windows`` x 5 steps: the model keeps training while its samples'
    weights are learned. Returns the model and the weights."""
    torch.manual_seed(seed)
    model, logits = make_net(), torch.zeros(len(data.train_y), requires_grad=True)
    opt = make_optimizer(model)
    meta_opt = torch.optim.Adam([logits], lr=0.3)
    for _ in range(windows):
        meta_opt.zero_grad()
        loss = validate_after_training(model, opt, logits, draw_batches(data, 5), data.val_x, data.val_y)
        loss.backward()  # logits.grad is the gradient through the five steps just taken
        meta_opt.step()
    return model, torch.sigmoid(logits).detach()


def train_plain(x, y, steps, seed=0):
    """The same net and optimizer without weights."""
    torch.manual_seed(seed)
    model = make_net()
    opt = make_optimizer(model)
    for _ in range(steps):
        index = torch.randperm(len(y))[:100]
        opt.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        opt.step()
    return model


def make_net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def make_optimizer(model):
    """Adam; with the default eps its first step is a mere sign, which has no useful derivative."""
    return torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-5)


class Digits(NamedTuple):
    """Noisy training samples, a few clean samples for validation, and a test set."""

    train_x: Tensor
    train_y: Tensor
    noisy: Tensor  # true where the label was replaced; read only by the report
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(noise=0.4, train=1000, val=100, seed=0):
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    noisy = torch.rand(train) < noise
    wrong = (y[:train] + torch.randint(1, 10, (train,))) % 10
    train_y = torch.where(noisy, wrong, y[:train])
    end = train + val
    return Digits(x[:train], train_y, noisy, x[train:end], y[train:end], x[end:], y[end:])


def draw_batches(data, steps, size=100):
    order = torch.randperm(len(data.train_y))[: steps * size]
    return [(index, data.train_x[index], data.train_y[index]) for index in order.split(size)]


def accuracy(model, data):
    with torch.no_grad():
        return (model(data.test_x).argmax(1) == data.test_y).float().mean().item()


def example_args():
    data = load()
    model, logits = make_net(), torch.zeros(len(data.train_y), requires_grad=True)
    opt = make_optimizer(model)
    return model, opt, logits, draw_batches(data, 5, size=20), data.val_x, data.val_y


def main(windows=100, noise=0.4, seed=0):
    data = load(noise, seed=seed)
    model, weights = train_reweighted(data, windows, seed)
    plain = train_plain(data.train_x, data.train_y, 5 * windows, seed)
    clean = train_plain(data.val_x, data.val_y, 5 * windows, seed)
    result = {
        "mean weight, clean samples": weights[~data.noisy].mean().item(),
        "mean weight, noisy samples": weights[data.noisy].mean().item(),
        "test accuracy, without weights": accuracy(plain, data),
        "test accuracy, the clean samples alone": accuracy(clean, data),
        "test accuracy, learned weights": accuracy(model, data),
    }
    for name, value in result.items():
        print(f"{name:40s}{value:.3f}")
    return result


if __name__ == "__main__":
    main()
