"""Hyperparameters of a pre-training, learned by what comes out after fine-tuning: implicit and unrolled together.

A classifier is pre-trained on digits from eight annotators until it has converged, with a weight for each annotator and
a weight decay; half of the annotators guess. It is then fine-tuned by five steps on thirty sure labels. The loss on
held-out digits is differentiated through the five steps as they are, and through the pre-training by the condition at
its end (``mlc.Implicit``): none of its steps is kept (Raghu et al.: Meta-learning to improve pre-training, 2021). The
gradient is compared with that through all steps of both.

    mlc run examples/pretraining.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mlc

ANNOTATORS = 8


def pretrain_and_finetune(net, log_weights, log_decay, source, few, val, steps):
    """Loss on ``val``; ``source`` is (images, labels, annotator of each), the others (images, labels)."""
    x, y, who = source
    opt = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.8)
    with mlc.level("pretrain"):
        for _ in range(steps):
            opt.zero_grad()
            weights = len(log_weights) * log_weights.softmax(0)
            decay = 0.5 * log_decay.exp() * sum(p.square().sum() for p in net.parameters())
            ((weights[who] * F.cross_entropy(net(x), y, reduction="none")).mean() + decay).backward()
            opt.step()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with mlc.level("finetune"):
        for _ in range(5):
            opt.zero_grad()
            F.cross_entropy(net(few[0]), few[1]).backward()
            opt.step()
    return F.cross_entropy(net(val[0]), val[1])


unrolled = mlc.compile(pretrain_and_finetune)
composed = mlc.compile(pretrain_and_finetune, flows={"pretrain": mlc.Implicit("cg", steps=30, tol=1e-4)})


def load(source=400, few=30, val=200, seed=0):
    """Source, few, held-out and test digits."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    who = torch.arange(source) % ANNOTATORS
    guessed = torch.where(who < ANNOTATORS // 2, y[:source], torch.randint(10, (source,)))
    parts = torch.arange(source, len(y)).split([few, val, len(y) - source - few - val])
    return (x[:source], guessed, who), *((x[p], y[p]) for p in parts)


def make_net():
    net = nn.Linear(64, 10)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


def start():
    return torch.zeros(ANNOTATORS, requires_grad=True), torch.tensor(-3.0, requires_grad=True)


def gradient(fn, *data, steps):
    hyper = start()
    grads = torch.autograd.grad(fn(make_net(), *hyper, *data, steps), hyper)
    return torch.cat([g.flatten() for g in grads])


def accuracy(hyper, data, test, steps):
    net = make_net()
    pretrain_and_finetune(net, *(h.detach() for h in hyper), *data, steps)
    return (net(test[0]).argmax(1) == test[1]).float().mean().item()


def example_args():
    source, few, val, _ = load(source=80, few=10, val=40)
    return make_net(), *start(), source, few, val, 8


def main(outer_steps=30, steps=80, seed=0):
    *data, test = load(seed=seed)
    exact, mine = (gradient(fn, *data, steps=steps) for fn in (unrolled, composed))
    hyper = start()
    opt = torch.optim.Adam(hyper, lr=0.2)
    for _ in range(outer_steps):
        opt.zero_grad()
        composed(make_net(), *hyper, *data, steps).backward()
        opt.step()
    weights = hyper[0].detach().softmax(0)
    result = {
        "error of the composed gradient": ((mine - exact).norm() / exact.norm()).item(),
        "kilobytes, all steps": unrolled.report.peak_bytes / 1024,
        "kilobytes, composed": composed.report.peak_bytes / 1024,
        "weight of the sure annotators": weights[: ANNOTATORS // 2].sum().item(),
        "weight of those who guess": weights[ANNOTATORS // 2 :].sum().item(),
        "test accuracy, start": accuracy(start(), data, test, steps),
        "test accuracy, learned": accuracy(hyper, data, test, steps),
    }
    for name, value in result.items():
        print(f"{name:34s}{value:9.4f}")
    return result


if __name__ == "__main__":
    main()
