"""Few-shot digits by implicit MAML, beside MAML that is unrolled.

A task is to tell three kinds of digits apart from two images of each. A copy of the network (``mlc.clone``) is trained
on these, pulled towards the weights it started from; the loss on other images of the task is differentiated by the
starting weights. Once the copy has converged, that gradient is a linear solve with the Hessian at its end: no step
before the last is kept (``mlc.Implicit("cg")``, Rajeswaran et al. 2019). Unrolled, it goes through every step (Finn et
al. 2017). The tasks of the test are of images that were never trained on.

    mlc run examples/imaml_digits.py
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mlc

PULL = 2.0
STEPS = 16


def adapt(fast, start, x, y):
    """Train ``fast`` on a task, pulled towards ``start``."""
    opt = torch.optim.SGD(fast.parameters(), lr=0.2, momentum=0.5)
    for _ in range(STEPS):
        opt.zero_grad()
        pairs = zip(fast.parameters(), start.parameters(), strict=True)
        distance = sum((p - q).square().sum() for p, q in pairs)
        (F.cross_entropy(fast(x), y) + 0.5 * PULL * distance).backward()
        opt.step()


def loss_after_adapting(model, tasks):
    """Mean query loss over tasks of (x, y, query_x, query_y), each with its own adapted copy."""
    total = 0.0
    for x, y, query_x, query_y in tasks:
        fast = mlc.clone(model)
        with mlc.level("adapt"):
            adapt(fast, model, x, y)
        total = total + F.cross_entropy(fast(query_x), query_y)
    return total / len(tasks)


unrolled = mlc.compile(loss_after_adapting)
implicit = mlc.compile(loss_after_adapting, flows={"adapt": mlc.Implicit("cg", steps=20, tol=1e-3)})


def make_net():
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))


def load():
    """Images by digit: those to train on, and those to test on."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    by_digit = [x[torch.tensor(labels == d)] for d in range(10)]
    return [d[::2] for d in by_digit], [d[1::2] for d in by_digit]


def draw_task(digits, shots=2, queries=10):
    """(x, y, query_x, query_y) of three of the digits, in any order."""
    chosen = [digits[i] for i in torch.randperm(len(digits))[:3]]
    rows = [d[torch.randperm(len(d))[: shots + queries]] for d in chosen]
    y = torch.arange(3)
    x, query_x = torch.cat([r[:shots] for r in rows]), torch.cat([r[shots:] for r in rows])
    return x, y.repeat_interleave(shots), query_x, y.repeat_interleave(queries)


def meta_train(objective, digits, outer_steps, seed=0):
    """A network, and the largest memory that a call took beyond its arguments, bytes."""
    torch.manual_seed(seed)
    model, peak = make_net(), 0
    meta_opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(outer_steps):
        meta_opt.zero_grad()
        objective(model, [draw_task(digits) for _ in range(3)]).backward()
        meta_opt.step()
        peak = max(peak, objective.report.peak_bytes)
    return model, peak


def accuracy(model, digits, tasks=60):
    """Mean query accuracy on new tasks after adapting."""
    torch.manual_seed(1)
    right = 0.0
    for _ in range(tasks):
        x, y, query_x, query_y = draw_task(digits)
        fast = copy.deepcopy(model)
        adapt(fast, model, x, y)
        right += (fast(query_x).argmax(1) == query_y).float().mean().item() / tasks
    return right


def agreement(model, digits):
    """Cosine between the implicit and the unrolled gradient on one batch of tasks."""
    tasks = [draw_task(digits) for _ in range(3)]
    both = [torch.autograd.grad(f(model, tasks), list(model.parameters())) for f in (implicit, unrolled)]
    one, two = (torch.cat([g.flatten() for g in grads]) for grads in both)
    return F.cosine_similarity(one, two, dim=0).item()


def example_args():
    torch.manual_seed(0)
    return make_net(), [draw_task(load()[0]) for _ in range(2)]


def main(outer_steps=40, seed=0):
    digits, held_out = load()
    torch.manual_seed(seed)
    result = {"cosine of the gradients": agreement(make_net(), digits)}
    result["accuracy, untrained"] = accuracy(make_net(), held_out)
    for name, objective in (("implicit", implicit), ("unrolled", unrolled)):
        model, peak = meta_train(objective, digits, outer_steps, seed)
        result[f"accuracy, {name}"] = accuracy(model, held_out)
        result[f"kilobytes, {name}"] = peak / 1024
    for name, value in result.items():
        print(f"{name:26s}{value:9.3f}")
    return result


if __name__ == "__main__":
    main()
