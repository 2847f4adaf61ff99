"""The loops of the gallery: one for each shape of level graph, small enough to read beside its picture."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mlc


def batches(n: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(n)]


def two_levels() -> mlc.Program:
    """A network weighs the samples of another one's training."""

    def reweight(model, weigh, batches, val):
        opt = Adam(model.parameters(), lr=1e-2, eps=1e-4)
        for x, y in batches:
            opt.zero_grad()
            losses = F.cross_entropy(model(x), y, reduction="none")
            (torch.sigmoid(weigh(x)).squeeze(1) * losses).mean().backward()
            opt.step()
        return F.cross_entropy(model(val[0]), val[1])

    return mlc.trace(reweight, nn.Linear(8, 3), nn.Linear(8, 1), batches(), batches(1)[0])


def three_level_chain() -> mlc.Program:
    """The weight decay is trained while it regularises a training; how it is trained is learned above."""

    def chain(model, decay, rate, batches, val):
        top = SGD([decay], lr=0.1)
        for _ in range(3):
            opt = Adam(model.parameters(), lr=1e-2, eps=1e-4)
            with mlc.level("inner"):
                for x, y in batches:
                    opt.zero_grad()
                    penalty = sum(p.square().sum() for p in model.parameters())
                    (F.cross_entropy(model(x), y) + decay.exp() * penalty).backward()
                    opt.step()
            top.zero_grad()
            (rate.exp() * F.cross_entropy(model(val[0]), val[1])).backward()
            top.step()
        return F.cross_entropy(model(val[0]), val[1])

    decay, rate = nn.Parameter(torch.tensor(-3.0)), nn.Parameter(torch.zeros(()))
    return mlc.trace(chain, nn.Linear(8, 3), decay, rate, batches(), batches(1)[0])


def two_paths() -> mlc.Program:
    """Features that a head is trained on, and that the result reads as well."""

    def shared(features, head, batches, val):
        opt = SGD(head.parameters(), lr=0.1, momentum=0.9)
        for x, y in batches:
            opt.zero_grad()
            F.cross_entropy(head(features(x)), y).backward()
            opt.step()
        return F.cross_entropy(head(features(val[0])), val[1])

    features = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
    return mlc.trace(shared, features, nn.Linear(6, 3), batches(), batches(1)[0])


def four_problems() -> mlc.Program:
    """Hyperparameters, a training, an adversary inside each step, and a critic trained on what came out."""

    def problems(model, critic, strength, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            shift = torch.zeros_like(x, requires_grad=True)
            for _ in range(3):
                (g,) = torch.autograd.grad(F.cross_entropy(model(x + shift), y), shift)
                shift = (shift + 0.1 * g).detach().requires_grad_()
            opt.zero_grad()
            F.cross_entropy(model(x + strength.sigmoid() * shift), y).backward()
            opt.step()
        judge = Adam(critic.parameters(), lr=1e-2, eps=1e-4)
        for x, y in batches:
            judge.zero_grad()
            wrong = F.cross_entropy(model(x), y, reduction="none")
            (critic(x).squeeze(1) - wrong).square().mean().backward()
            judge.step()
        return critic(val[0]).mean() + F.cross_entropy(model(val[0]), val[1])

    strength = nn.Parameter(torch.zeros(()))
    return mlc.trace(problems, nn.Linear(8, 3), nn.Linear(8, 1), strength, batches(), batches(1)[0])


def maml() -> mlc.Program:
    """Initial weights from which a few steps on a task lead far (Finn et al. 2017)."""

    def adapt(model, tasks):
        total = 0.0
        for x, y in tasks:
            fast = mlc.clone(model)
            opt = SGD(fast.parameters(), lr=0.1)
            for _ in range(4):
                opt.zero_grad()
                F.cross_entropy(fast(x), y).backward()
                opt.step()
            total = total + F.cross_entropy(fast(x), y)
        return total / len(tasks)

    return mlc.trace(adapt, nn.Linear(8, 3), batches(3))


def stopped() -> mlc.Program:
    """Weights of samples that enter the loss twice, once behind a detach()."""

    def gated(model, weigh, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            weight = torch.sigmoid(weigh(x)).squeeze(1)
            scale = weight.sum().detach()  # normalise, but learn nothing from it
            losses = F.cross_entropy(model(x), y, reduction="none")
            (weight * losses / scale).sum().backward()
            opt.step()
        return F.cross_entropy(model(val[0]), val[1])

    return mlc.trace(gated, nn.Linear(8, 3), nn.Linear(8, 1), batches(), batches(1)[0])


LOOPS: dict[str, Callable[[], mlc.Program]] = {
    f.__name__: f for f in (two_levels, three_level_chain, two_paths, four_problems, maml, stopped)
}
