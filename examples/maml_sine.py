"""MAML on sine waves: learn initial weights from which two SGD steps suffice.

A task is a sine wave of unknown amplitude and phase, seen through ten points. The inner loop adapts a
copy of the network to it by ordinary SGD; ``mlc.clone`` makes the copy, and the loss after adapting is
differentiated through the steps back to the weights that were copied. The opponent is the same network
trained on all waves at once, which can only learn their mean.
(Finn, Abbeel, Levine: Model-agnostic meta-learning, 2017.)

    mlc run examples/maml_sine.py
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import mlc

INNER_RATE = 0.03


@mlc.compile
def loss_after_adapting(model, tasks):
    """Mean query loss over tasks of (x, y, query_x, query_y), each with its own adapted copy."""
    total = 0.0
    for x, y, query_x, query_y in tasks:
        fast = mlc.clone(model)
        opt = torch.optim.SGD(fast.parameters(), lr=INNER_RATE)
        for _ in range(2):
            opt.zero_grad()
            F.mse_loss(fast(x), y).backward()
            opt.step()
        total = total + F.mse_loss(fast(query_x), query_y)
    return total / len(tasks)


def meta_train(model, outer_steps):
    meta_opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(outer_steps):
        meta_opt.zero_grad()
        loss_after_adapting(model, [draw_task() for _ in range(4)]).backward()
        meta_opt.step()


def train_jointly(model, outer_steps):
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(outer_steps):
        tasks = [draw_task() for _ in range(4)]
        x, y, query_x, query_y = (torch.cat(t) for t in zip(*tasks, strict=True))
        opt.zero_grad()
        F.mse_loss(model(torch.cat([x, query_x])), torch.cat([y, query_y])).backward()
        opt.step()


def query_losses(model, steps=5, tasks=100):
    """Mean query loss on new tasks after 0, 1, ... ``steps`` ordinary SGD steps."""
    torch.manual_seed(1)
    losses = torch.zeros(steps + 1)
    for _ in range(tasks):
        x, y, query_x, query_y = draw_task()
        fast = copy.deepcopy(model)
        opt = torch.optim.SGD(fast.parameters(), lr=INNER_RATE)
        for step in range(steps + 1):
            losses[step] += F.mse_loss(fast(query_x), query_y).detach() / tasks
            opt.zero_grad()
            F.mse_loss(fast(x), y).backward()
            opt.step()
    return losses.tolist()


def make_net(width=40):
    layers = nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    return nn.Sequential(*layers)


def draw_task(points=10):
    """(x, y, query_x, query_y) of one wave: amplitude 0.1 to 5, phase 0 to pi, x from -5 to 5."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(()), math.pi * torch.rand(())
    x = 10 * torch.rand(2 * points, 1) - 5
    y = amplitude * torch.sin(x - phase)
    return x[:points], y[:points], x[points:], y[points:]


def example_args():
    torch.manual_seed(0)
    return make_net(), [draw_task() for _ in range(2)]


def main(outer_steps=600, seed=0):
    torch.manual_seed(seed)
    model, joint = make_net(), make_net()
    meta_train(model, outer_steps)
    train_jointly(joint, outer_steps)
    result = {"maml": query_losses(model), "joint": query_losses(joint)}
    print("query loss after SGD steps" + "".join(f"{step:8d}" for step in range(6)))
    for name, losses in result.items():
        print(f"{name:26s}" + "".join(f"{loss:8.2f}" for loss in losses))
    return result


if __name__ == "__main__":
    main()
