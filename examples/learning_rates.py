"""Learn one learning rate per parameter tensor.

A four-layer tanh network is trained on scikit-learn's digits for ten plain SGD steps, each weight and
each bias with a learning rate of its own. The logarithms of the rates are meta-parameters: the
validation loss is differentiated through the ten steps, each time from fresh initial weights. The
opponent takes the same ten steps with one rate for all tensors, the best of a grid.

    mlc run examples/learning_rates.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mlc


def train(model, rates, batches, val):
    """An ordinary training loop with a learning rate per tensor; returns the validation loss."""
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), rates, strict=True)]
    opt = torch.optim.SGD(groups)
    for x, y in batches:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return F.cross_entropy(model(val[0]), val[1])


@mlc.compile
def validate_after_training(model, log_rates, batches, val):
    return train(model, log_rates.exp(), batches, val)


def learn_rates(model, data, val, outer_steps, start=0.1):
    """Adam on the logarithms of the rates, all of them ``start`` at first."""
    log_rates = torch.full((len(list(model.parameters())),), start).log().requires_grad_()
    meta_opt = torch.optim.Adam([log_rates], lr=0.1)
    for _ in range(outer_steps):
        reset(model)
        meta_opt.zero_grad()
        validate_after_training(model, log_rates, draw_batches(data), val).backward()
        meta_opt.step()
    return log_rates.detach().exp()


def evaluate(model, rates, data, held_out, runs=10):
    """Mean loss and accuracy on ``held_out`` over training runs that the rates have not seen."""
    torch.manual_seed(1)
    x, y = held_out
    loss = accuracy = 0.0
    for _ in range(runs):
        reset(model)
        loss += train(model, rates, draw_batches(data), held_out).item() / runs
        accuracy += (model(x).argmax(1) == y).float().mean().item() / runs
    return loss, accuracy


def make_net():
    hidden = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def reset(model):
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()


def load():
    """Training, validation and test set of digits, standardised."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order], torch.tensor(labels)[order]
    x = (x - x[:1000].mean(0)) / x[:1000].std()
    return (x[:1000], y[:1000]), (x[1000:1300], y[1000:1300]), (x[1300:], y[1300:])


def draw_batches(data, steps=10, size=50):
    x, y = data
    return [(x[index], y[index]) for index in torch.randperm(len(y))[: steps * size].split(size)]


def example_args():
    torch.manual_seed(0)
    data, val, _ = load()
    model = make_net()
    log_rates = torch.full((len(list(model.parameters())),), -2.0, requires_grad=True)
    return model, log_rates, draw_batches(data, steps=4), val


def main(outer_steps=300, seed=0):
    torch.manual_seed(seed)
    data, val, test = load()
    model = make_net()
    learned = learn_rates(model, data, val, outer_steps)
    grid = [torch.full_like(learned, rate) for rate in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)]
    single = min(grid, key=lambda rates: evaluate(model, rates, data, val)[0])
    for (name, _), rate in zip(model.named_parameters(), learned.tolist(), strict=True):
        print(f"learned rate of {name:10s}{rate:8.3f}")
    result = {}
    for name, rates in ((f"one rate, {single[0]:.2f}", single), ("learned rates", learned)):
        loss, accuracy = evaluate(model, rates, data, test)
        print(f"{name:20s} test loss {loss:.3f}   test accuracy {accuracy:.3f}")
        result[name.split(",")[0]] = {"loss": loss, "accuracy": accuracy}
    return result


if __name__ == "__main__":
    main()
