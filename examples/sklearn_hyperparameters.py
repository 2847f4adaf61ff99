"""Learn how much scikit-learn's logistic regression should trust each pixel.

scikit-learn fits; nobody differentiates its solver. What is differentiated is the condition that its answer
satisfies: the gradient of the penalised training loss is zero (mlc.root). Each pixel is multiplied by a scale, which is
a penalty of its own on its weights. The logarithms of the scales are meta-parameters, learned on 700 validation
digits from fits on 100 digits; the opponent is the best single scale of a grid on the same digits.

    mlc run examples/sklearn_hyperparameters.py
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import mlc


def penalised_loss(weight, scale, x, y):
    """What scikit-learn minimises; ``weight`` is (10 classes, features)."""
    return F.cross_entropy((x * scale) @ weight.T, y, reduction="sum") + 0.5 * (weight**2).sum()


@mlc.root(torch.func.grad(penalised_loss))
def fit(scale, x, y):
    model = LogisticRegression(C=1.0, fit_intercept=False, solver="newton-cg", tol=1e-8, max_iter=1000)
    return model.fit((x * scale).numpy(), y.numpy()).coef_


@mlc.compile
def loss_after_fitting(log_scale, train, val):
    scale = log_scale.exp()
    weight = fit(scale, *train)
    return F.cross_entropy((val[0] * scale) @ weight.T, val[1])


def learn_scales(train, val, outer_steps, start):
    """Adam on the logarithms of the scales."""
    log_scale = start.clone().requires_grad_()
    meta_opt = torch.optim.Adam([log_scale], lr=0.1)
    for _ in range(outer_steps):
        meta_opt.zero_grad()
        loss_after_fitting(log_scale, train, val).backward()
        meta_opt.step()
    return log_scale.detach()


def evaluate(log_scale, train, held_out):
    """Loss and accuracy on ``held_out`` of a fit with these scales."""
    with torch.no_grad():
        logits = (held_out[0] * log_scale.exp()) @ fit(log_scale.exp(), *train).T
        accuracy = (logits.argmax(1) == held_out[1]).double().mean().item()
        return F.cross_entropy(logits, held_out[1]).item(), accuracy


def load(sizes=(100, 700)):
    """Training, validation and test digits: pixels between 0 and 1, and a constant."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.tensor(np.c_[images / 16.0, np.ones(len(labels))][order])
    y = torch.tensor(labels[order])
    cuts = (0, *itertools.accumulate(sizes), len(y))
    return tuple((x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts))


def example_args():
    train, val, _ = load(sizes=(60, 100))
    return torch.linspace(-0.5, 0.5, 65, dtype=torch.float64).requires_grad_(), train, val


def main(outer_steps=40):
    train, val, test = load()
    grid = [torch.full((65,), s, dtype=torch.float64).log() for s in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)]
    single = min(grid, key=lambda s: evaluate(s, train, val)[0])
    learned = learn_scales(train, val, outer_steps, single)
    result = {}
    for name, log_scale in (("one scale", single), ("learned scales", learned)):
        loss, accuracy = evaluate(log_scale, train, test)
        print(f"{name:16s} test loss {loss:.3f}   test accuracy {accuracy:.3f}")
        result[name] = {"loss": loss, "accuracy": accuracy}
    print("log10 of the scale of each pixel:")
    for row in learned[:64].exp().log10().reshape(8, 8).tolist():
        print("  " + " ".join(f"{v:5.1f}" for v in row))
    return result


if __name__ == "__main__":
    main()
