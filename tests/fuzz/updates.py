"""Updates of the trained parameters: every optimizer of `tests.numerics.optimizers`, and those written by hand.

Traits: `opt` (an optimizer `opt`), `grad` (`p.grad` is there after backward), `fast` (functional weights), `hand` (a
rate that may be learned).
"""

from __future__ import annotations

from typing import Any

from tests.fuzz.draft import Draft
from tests.fuzz.losses import LOSSES
from tests.fuzz.models import MODELS
from tests.fuzz.piece import Axis
from tests.fuzz.spec import Spec
from tests.numerics.optimizers import OPTIMIZERS

UPDATES = Axis("update")

# Hyperparameters that PyTorch takes as tensors that require grad, by class and flags; with where they start.
ADAM = {"lr": "0.05", "betas": "(0.8, 0.9)", "eps": "0.01"}
TENSORS: dict[str, dict[str, str]] = {
    "SGD": {"lr": "0.1", "momentum": "0.8", "weight_decay": "0.05"},
    "Adam": ADAM,
    "AdamW": {**ADAM, "weight_decay": "0.1"},
    "NAdam": {**ADAM, "momentum_decay": "0.1"},
    "RAdam": ADAM,
    "Adamax": ADAM,
    "Adagrad": {"lr": "0.1", "lr_decay": "0.1", "eps": "0.01"},
    "Adadelta": {"lr": "1.0", "rho": "0.8", "eps": "0.01"},
    "ASGD": {"lr": "0.1", "lambd": "0.05", "alpha": "0.6"},
    "RMSprop": {"lr": "0.02", "alpha": "0.9", "eps": "0.01"},
    "Adafactor": {"lr": "0.05", "beta2_decay": "-0.7", "d": "1.5", "weight_decay": "0.1"},
}


def tensors(update: str) -> dict[str, str]:
    """Hyperparameters of an update that can be learned."""
    if update not in OPTIMIZERS:
        return {"rate": "0.1"} if "hand" in UPDATES[update].traits else {}
    cls, given = OPTIMIZERS[update]
    if given.get("fused"):
        return {"lr": TENSORS[cls.__name__]["lr"]}
    found = dict(TENSORS[cls.__name__])
    if given.get("foreach") and cls.__name__ != "SGD":
        del found["lr"], found["betas"]
    if given.get("foreach") and cls.__name__ == "SGD":
        del found["weight_decay"]
    if given.get("nesterov"):
        del found["momentum"]
    if given.get("decoupled_weight_decay"):
        found["weight_decay"] = "0.1"
    return found


def written(value: Any) -> str:
    return repr(value)


def optimizer(name: str) -> None:
    cls, given = OPTIMIZERS[name]

    def write(d: Draft) -> None:
        settings = {**{k: written(v) for k, v in given.items()}, **d.hyper}
        net = "model" if d.spec.place == "outside" else "net"
        params = d.groups.format(net=net) if d.groups else f"{net}.parameters()"
        d.opt.append(
            f"opt = torch.optim.{cls.__name__}({params}, {', '.join(f'{k}={v}' for k, v in settings.items())})"
        )

    UPDATES.put(name, write, "opt grad", weight=3 if name in ("sgd", "sgd_momentum", "adam") else 1)


for _name in OPTIMIZERS:
    optimizer(_name)

EACH = "with torch.no_grad():\n    for p in params:\n        "


def by_hand(name: str, step: str, setup: str = "", zero: str = "net.zero_grad()") -> None:
    """Without an optimizer; `{rate}` may be a meta-parameter."""

    def write(d: Draft) -> None:
        d.late.append("params = [p for p in net.parameters() if p.requires_grad]")
        d.late += [setup] if setup else []
        d.zero = [zero] if zero else []
        d.step = [step.format(rate=d.rate)]

    UPDATES.put(name, write, "grad hand")


by_hand("hand_minus", EACH + "p -= {rate} * p.grad")
by_hand("hand_sub", EACH + "p.sub_({rate} * p.grad)", zero="for p in params:\n    p.grad = None")
by_hand("hand_copy", EACH + "p.copy_(p - {rate} * p.grad)")
by_hand("hand_data", "for p in params:\n    p.data.add_(-{rate} * p.grad)")
by_hand("hand_data_copy", "for p in params:\n    p.data.copy_(p.data - {rate} * p.grad)")
by_hand("hand_data_set", "for p in params:\n    p.data = p.data - {rate} * p.grad.data")
by_hand("hand_foreach", "with torch.no_grad():\n    torch._foreach_add_(params, [-{rate} * p.grad for p in params])")
by_hand(
    "hand_momentum",
    "with torch.no_grad():\n    for p, v in zip(params, speed):\n"
    "        v.mul_(0.9).add_(p.grad)\n        p.sub_({rate} * v)",
    "speed = [torch.zeros_like(p) for p in params]",
)


@UPDATES.add("hand opt_free")
def hand_autograd(d: Draft) -> None:
    d.late.append("params = [p for p in net.parameters() if p.requires_grad]")
    d.zero, d.step = [], []
    d.backward = ["found = torch.autograd.grad(loss, params)"]
    d.step = [f"with torch.no_grad():\n    for p, g in zip(params, found):\n        p -= {d.rate} * g"]


def twice(spec: Spec) -> bool:
    return "first" not in MODELS[spec.model].traits | LOSSES[spec.loss].traits


@UPDATES.add("fast hand", weight=4, fits=twice)
def fast(d: Draft) -> None:
    d.need("from torch.func import functional_call")
    d.late.append("fast = {name: p for name, p in net.named_parameters() if p.requires_grad}")
    d.metas["**"] = "{name: p for name, p in model.named_parameters() if p.requires_grad}"
    d.zero = []
    d.call = d.final = "functional_call(net, fast, ({x},))"
    d.backward = ["found = torch.autograd.grad(loss, list(fast.values()), create_graph=True)"]
    d.step = [f"fast = {{name: p - {d.rate} * g for (name, p), g in zip(fast.items(), found)}}"]


@UPDATES.add("fast hand", weight=1)
def fast_plain(d: Draft) -> None:
    """First-order fast weights: what the inner gradient is, is a constant to the loop's own."""
    fast(d)
    d.backward = ["found = torch.autograd.grad(loss, list(fast.values()))"]
    d.step = [
        f"fast = {{name: p - {d.rate} * g for (name, p), g in zip(fast.items(), found)}}",
    ]
