"""MAML on sine waves: fast weights by `autograd.grad(create_graph=True)`, a meta-optimizer, adaptation to new tasks."""

import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from tests.scripts.data import Settings
from tests.scripts.script import Script


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            OrderedDict(l1=nn.Linear(1, 10), a1=nn.Tanh(), l2=nn.Linear(10, 10), a2=nn.Tanh(), l3=nn.Linear(10, 1))
        )

    def forward(self, x):
        return self.net(x)

    def argforward(self, x, weights):
        x = torch.tanh(F.linear(x, weights["net.l1.weight"], weights["net.l1.bias"]))
        x = torch.tanh(F.linear(x, weights["net.l2.weight"], weights["net.l2.bias"]))
        return F.linear(x, weights["net.l3.weight"], weights["net.l3.bias"])


class SineTask:
    def __init__(self):
        self.amplitude = float(0.5 + 2 * torch.rand(()))
        self.phase = float(math.pi * torch.rand(()))

    def sample_data(self, size=5):
        x = 4 * torch.rand(size, 1) - 2
        return x, self.amplitude * torch.sin(x + self.phase)


class MAML:
    def __init__(self, model, args):
        self.model = model
        self.weights = list(model.parameters())
        self.meta_optimiser = torch.optim.Adam(self.weights, args.meta_lr, eps=1e-4)
        self.inner_lr = args.inner_lr
        self.inner_steps = args.inner_steps
        self.tasks_per_meta_batch = args.tasks_per_meta_batch
        self.K = args.K
        self.meta_losses = []

    def inner_loop(self, task, create_graph=True):
        temp_weights = OrderedDict((name, p.clone()) for name, p in self.model.named_parameters())
        X, y = task.sample_data(self.K)
        for _ in range(self.inner_steps):
            loss = F.mse_loss(self.model.argforward(X, temp_weights), y)
            grad = torch.autograd.grad(loss, temp_weights.values(), create_graph=create_graph)
            # was: temp_weights = OrderedDict((n, w - 0.05 * g) for (n, w), g in zip(temp_weights.items(), grad))
            temp_weights = OrderedDict((n, w - self.inner_lr * g) for (n, w), g in zip(temp_weights.items(), grad))
        X, y = task.sample_data(self.K)
        return F.mse_loss(self.model.argforward(X, temp_weights), y)

    def main_loop(self, num_iterations):
        epoch_loss = 0
        for iteration in range(1, num_iterations + 1):
            meta_loss = 0
            for _ in range(self.tasks_per_meta_batch):
                meta_loss += self.inner_loop(SineTask())
            self.meta_optimiser.zero_grad()
            meta_loss.backward()
            self.meta_optimiser.step()
            epoch_loss += meta_loss.item() / self.tasks_per_meta_batch
            if iteration % 2 == 0:
                print("{}/{}. loss: {:.6f}".format(iteration, num_iterations, epoch_loss / 2))
                self.meta_losses.append(epoch_loss / 2)
                epoch_loss = 0


def main(args, model, val_tasks):
    maml = MAML(model, args)
    maml.main_loop(args.iterations)
    args.meta_losses = maml.meta_losses
    return sum(maml.inner_loop(task) for task in val_tasks) / len(val_tasks)


def make():
    inner_lr = torch.tensor(0.05, requires_grad=True)
    args = Settings(meta_lr=0.02, inner_lr=inner_lr, inner_steps=2, tasks_per_meta_batch=2, K=5, iterations=4)
    return {"args": args, "model": Net(), "val_tasks": [SineTask(), SineTask()]}


SCRIPT = Script("maml", main, make, lambda a: {"inner_lr": a["args"].inner_lr})
