"""A self-tuning network: the penalty of a regression is tuned while it trains, by a hypernetwork.

The regression's weights are a function of the penalty, ``base + slope * (log penalty)``: a hypernetwork that learns the
best response near the current penalty (MacKay et al.: Self-tuning networks, 2019). The lower level trains it on
penalties around the current one; the upper level moves the penalty along the validation loss of that response, with
no gradient through the training (``mlc.Alternating``), since the response is in the weights. What it finds is held
against a grid of penalties for which the regression is solved exactly.

    mlc run examples/self_tuning.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import nn

import mlc


class Hypernetwork(nn.Module):
    """Weights of the regression as a linear function of the logarithm of its penalty."""

    def __init__(self, features):
        super().__init__()
        self.base = nn.Parameter(torch.zeros(features))
        self.slope = nn.Parameter(torch.zeros(features))

    def forward(self, log_penalty):
        return self.base + self.slope * log_penalty[..., None]


def problems(train, val, start, seed=0, spread=0.5):
    """The levels, the hypernetwork, and the logarithm of the penalty."""
    torch.manual_seed(seed)
    network, log_penalty = Hypernetwork(train[0].shape[1]), torch.tensor(start, requires_grad=True)

    def noise():
        while True:
            yield spread * torch.randn(16)

    def fitting(shift):
        near = log_penalty.detach() + shift  # penalties around the current one
        weight = network(near)
        errors = (train[0] @ weight.T - train[1][:, None]).square().mean(0)
        return (errors + near.exp() * weight.square().sum(1)).mean()

    def held_out():
        return F.mse_loss(val[0] @ network(log_penalty), val[1])

    def adam(params):
        return torch.optim.Adam(params, lr=0.01, eps=1e-5)

    lower = mlc.Level("response", network, adam, fitting, noise, steps=5)
    upper = mlc.Level("penalty", log_penalty, torch.optim.Adam([log_penalty], lr=0.05), held_out)
    return [mlc.Alternating(lower, upper)], network, log_penalty


def load(train=60, val=100, seed=0):
    """Training and validation data: standardised features, as many of noise, a standardised target."""
    x, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    torch.manual_seed(seed)
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.randn_like(x)], 1)
    order = torch.randperm(len(y))
    return [(x[i], ((y - y.mean()) / y.std())[i]) for i in (order[:train], order[train : train + val])]


def solved(log_penalty, train, val):
    """Validation loss of the regression with this penalty, in closed form."""
    (x, y), n = train, len(train[1])
    weight = torch.linalg.solve(x.T @ x / n + torch.tensor(log_penalty).exp() * torch.eye(x.shape[1]), x.T @ y / n)
    return F.mse_loss(val[0] @ weight, val[1]).item()


def example_training():
    levels, _, _ = problems(*load(train=20, val=20), start=-2.0)
    return mlc.Training(levels)


def main(steps=300, start=-3.0, seed=0):
    train, val = load(seed=seed)
    levels, network, log_penalty = problems(train, val, start, seed)
    mlc.Training(levels).run(steps)
    grid = [k / 10 for k in range(-40, 31)]
    best = min(grid, key=lambda p: solved(p, train, val))
    found = log_penalty.item()
    with torch.no_grad():
        tuned = F.mse_loss(val[0] @ network(log_penalty), val[1]).item()
    result = {
        "log penalty, start": start,
        "log penalty, tuned": found,
        "log penalty, best of a grid": best,
        "validation loss, start": solved(start, train, val),
        "validation loss, tuned net": tuned,
        "validation loss, solved there": solved(found, train, val),
        "validation loss, best of a grid": solved(best, train, val),
    }
    for name, value in result.items():
        print(f"{name:34s}{value:7.3f}")
    return result


if __name__ == "__main__":
    main()
