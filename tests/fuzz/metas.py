"""Meta-parameters: what is learned through the loop, and how it enters it.

A learned thing is an entry of the argument `meta`, or a module there. Traits: `cut` (its value is read through a
`detach`, marked in the line), `draws`.
"""

from __future__ import annotations

import math

from tests.fuzz.draft import Draft
from tests.fuzz.losses import target
from tests.fuzz.models import MODELS
from tests.fuzz.piece import Axis
from tests.fuzz.spec import Spec
from tests.fuzz.updates import TENSORS, UPDATES, tensors

METAS = Axis("metas")


def floats(spec: Spec) -> bool:
    """Whether the examples are floating numbers."""
    return "ints" not in MODELS[spec.model].traits


def classes(spec: Spec) -> bool:
    """Whether the targets are classes."""
    return target(spec.loss) == "class"


def module(d: Draft, name: str, text: str) -> str:
    """A module that is learned."""
    d.make.append(f'meta["{name}"] = {text}')
    d.metas[f"{name}."] = f'dict(meta["{name}"].named_parameters(prefix="{name}"))'
    return f'meta["{name}"]'


def total(d: Draft) -> int:
    return d.spec.steps * d.spec.batch


@METAS.add(takes="weights", weight=2)
def example_weights(d: Draft) -> None:
    w = d.meta("weights", f"torch.randn({total(d)})")
    d.weights.append(f"losses = torch.sigmoid({w}[n]) * losses")


@METAS.add(takes="weights")
def position_weights(d: Draft) -> None:
    w = d.meta("weights", f"torch.rand({d.spec.batch}) + 0.5")
    d.weights.append(f"losses = {w} * losses")


@METAS.add(takes="weights mean")
def softmax_weights(d: Draft) -> None:
    w = d.meta("weights", f"torch.randn({total(d)})")
    d.mean = f"(torch.softmax({w}[n], 0) * losses).sum()"


@METAS.add(fits=classes)
def class_weights(d: Draft) -> None:
    w = d.meta("classes", "torch.rand(3) + 0.5")
    d.weights.append(f"losses = {w}[y] * losses")


@METAS.add(takes="weights", fits=floats, weight=2)
def weight_net(d: Draft) -> None:
    net = module(d, "weigh", f"nn.Linear({math.prod(d.shape)}, 1)")
    d.weights.append(f"losses = torch.sigmoid({net}(x.flatten(1)).squeeze(1)) * losses")


@METAS.add(takes="weights")
def loss_weight_net(d: Draft) -> None:
    net = module(d, "weigh", "nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))")
    d.weights.append(f"losses = torch.sigmoid({net}(losses.unsqueeze(1)).squeeze(1)) * losses")


@METAS.add("cut", takes="weights")
def loss_weight_net_cut(d: Draft) -> None:
    net = module(d, "weigh", "nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))")
    d.weights.append("seen_losses = losses.detach()  # cut")
    d.weights.append(f"losses = torch.sigmoid({net}(seen_losses.unsqueeze(1)).squeeze(1)) * losses")


@METAS.add()
def two_losses(d: Draft) -> None:
    a, b = d.meta("first", "torch.tensor(-0.3)"), d.meta("second", "torch.tensor(0.2)")
    d.terms.append(f"loss = {a}.exp() * loss + {b} * F.softplus(out).mean()")


PENALTY = "sum(p.square().sum() for p in net.parameters())"


def functional(spec: Spec) -> bool:
    """Whether the weights that are trained are the module's own."""
    return "fast" not in UPDATES[spec.update].traits


@METAS.add(weight=2, fits=functional)
def ridge(d: Draft) -> None:
    d.terms.append(f"loss = loss + {d.meta('ridge', 'torch.tensor(-3.0)')}.exp() * {PENALTY}")


@METAS.add(fits=functional)
def ridge_each(d: Draft) -> None:
    r = d.meta("each", "torch.full((20,), 0.02)")
    d.terms.append(f"loss = loss + sum(r * p.square().sum() for r, p in zip({r}, net.parameters()))")


@METAS.add(fits=functional)
def lasso(d: Draft) -> None:
    r = d.meta("lasso", "torch.tensor(0.02)")
    d.terms.append(f"loss = loss + {r} * sum((p.square() + 0.01).sqrt().sum() for p in net.parameters())")


@METAS.add(takes="targets", fits=classes)
def label_mix(d: Draft) -> None:
    m = d.meta("mix", "torch.tensor(-1.0)")
    d.outs.append(f"a = torch.sigmoid({m})")
    d.weights.insert(0, "losses = (1 - a) * losses - a * out.log_softmax(1).mean(1)")


@METAS.add(takes="targets")
def labels(d: Draft) -> None:
    w = d.meta("labels", f"torch.randn({total(d)}, 3)")
    d.weights.insert(0, f"losses = losses - (torch.softmax({w}[n], 1) * out.log_softmax(1)).sum(1)")


@METAS.add(takes="targets", fits=floats)
def teacher(d: Draft) -> None:
    net = module(d, "teacher", f"nn.Linear({math.prod(d.shape)}, 3)")
    d.weights.insert(
        0,
        f"losses = losses + F.kl_div(out.log_softmax(1), {net}(x.flatten(1)).softmax(1), reduction='none').sum(1)",
    )


@METAS.add(takes="input", fits=floats)
def augment(d: Draft) -> None:
    a, b = d.meta("scale", "torch.tensor(1.1)"), d.meta("shift", f"torch.randn({d.shape}) / 4")
    d.pre.append(f"x = x * {a} + {b}")


@METAS.add("draws", takes="input", fits=floats)
def noise(d: Draft) -> None:
    s = d.meta("sigma", "torch.tensor(-1.5)")
    d.pre.append(f"x = x + {s}.exp() * torch.randn_like(x)")


@METAS.add(takes="input", fits=floats)
def distilled(d: Draft) -> None:
    w = d.meta("images", f"torch.randn({(d.spec.batch, *d.shape)})")
    d.pre.append(f"x = {w}")


@METAS.add(takes="input", fits=floats)
def distilled_all(d: Draft) -> None:
    w = d.meta("images", f"torch.randn({(total(d), *d.shape)})")
    d.pre.append(f"x = {w}[n]")


@METAS.add()
def temperature(d: Draft) -> None:
    d.outs.append(f"out = out / {d.meta('heat', 'torch.tensor(0.3)')}.exp()")


@METAS.add()
def bias(d: Draft) -> None:
    d.outs.append(f"out = out + {d.meta('bias', 'torch.randn(3) / 2')}")


@METAS.add()
def loss_net(d: Draft) -> None:
    net = module(d, "judge", "nn.Sequential(nn.Linear(3, 3), nn.Softplus(), nn.Linear(3, 1))")
    d.terms.append(f"loss = loss + {net}(out).mean()")


def copied(spec: Spec) -> bool:
    """Whether the function may train a copy of its model."""
    outside = spec.place == "outside" and "opt" in UPDATES[spec.update].traits
    return not outside and functional(spec)


@METAS.add(takes="net", fits=copied, weight=2)
def init(d: Draft) -> None:
    d.metas["**"] = "{name: p for name, p in model.named_parameters() if p.requires_grad}"
    d.setup[0] = "net = mlc.clone(model)"


@METAS.add(takes="grads", fits=lambda spec: "grad" in UPDATES[spec.update].traits)
def grad_scale(d: Draft) -> None:
    s = d.meta("grad_scale", "torch.tensor(0.9)")
    d.grads.append(
        "with torch.no_grad():\n    for p in net.parameters():\n"
        f"        if p.grad is not None:\n            p.grad.mul_({s})"
    )


def hyper(name: str) -> None:
    """A hyperparameter of the optimizer, or the rate of an update by hand."""

    def write(d: Draft) -> None:
        start = tensors(d.spec.update)[name]
        if name == "betas":
            one = [d.meta(f"beta{i}", f"torch.tensor({b})") for i, b in enumerate(start.strip("()").split(", "))]
            d.hyper["betas"] = f"({one[0]}, {one[1]})"
        elif name == "rate":
            d.rate = d.meta("rate", f"torch.tensor({start})")
        else:
            d.hyper[name] = d.meta(name, f"torch.tensor({start})")

    METAS.put(f"opt_{name}", write, takes=f"opt_{name}", fits=lambda spec: name in tensors(spec.update), weight=1.5)


for _name in sorted({"rate", *(h for found in TENSORS.values() for h in found)}):
    hyper(_name)


@METAS.add(takes="opt_lr", fits=lambda spec: "lr" in tensors(spec.update) and spec.place == "inside")
def log_lr(d: Draft) -> None:
    d.hyper["lr"] = d.meta("log_lr", "torch.tensor(-2.5)") + ".exp()"


@METAS.add(
    takes="opt_lr groups", fits=lambda spec: "lr" in tensors(spec.update) and "frozen" not in MODELS[spec.model].traits
)
def lr_groups(d: Draft) -> None:
    a, b = d.meta("lr0", "torch.tensor(0.05)"), d.meta("lr1", "torch.tensor(0.1)")
    first, rest = "list({net}.parameters())[:1]", "list({net}.parameters())[1:]"
    d.groups = f'[{{{{"params": {first}, "lr": {a}}}}}, {{{{"params": {rest}, "lr": {b}}}}}]'
