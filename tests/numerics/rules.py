"""Differentiable updates of every torch.optim optimizer that has a derivative.

Each rule is a pure function `(p, g, s, h) -> (p', s')`: parameter, gradient, state and hyperparameters
of one parameter in, new parameter and new state out. `s` is empty before the first step and uses
torch's own names, so that the state of a real optimizer can be continued. Numbers in `h` may be tensors
that require grad. Nothing here imports mlc: these rules are the referee.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Hyper = Mapping[str, Any]
Rule = Callable[[Tensor, Tensor, State, Hyper], tuple[Tensor, State]]


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose derivative at exactly zero is zero."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


def safe_norm(x: Tensor) -> Tensor:
    """Euclidean norm with derivative zero at zero."""
    return safe_sqrt((x * x).sum())


def _signed(g: Tensor, h: Hyper) -> Tensor:
    return -g if h["maximize"] else g


def _l2(p: Tensor, g: Tensor, h: Hyper) -> Tensor:
    return g + h["weight_decay"] * p


def _decay(p: Tensor, g: Tensor, h: Hyper) -> tuple[Tensor, Tensor]:
    """Weight decay, decoupled from the gradient or added to it."""
    if h.get("decoupled_weight_decay", False):
        return p * (1 - h["lr"] * h["weight_decay"]), g
    return p, _l2(p, g, h)


def _moments(g: Tensor, s: State, h: Hyper) -> State:
    beta1, beta2 = h["betas"]
    m, v = s.get("exp_avg", torch.zeros_like(g)), s.get("exp_avg_sq", torch.zeros_like(g))
    return {
        **s,
        "step": int(s.get("step", 0)) + 1,
        "exp_avg": beta1 * m + (1 - beta1) * g,
        "exp_avg_sq": beta2 * v + (1 - beta2) * g * g,
    }


def sgd(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    g = _l2(p, _signed(g, h), h)
    if h["momentum"] == 0:
        return p - h["lr"] * g, s
    old = s.get("momentum_buffer")
    buf = g if old is None else h["momentum"] * old + (1 - h["dampening"]) * g
    move = g + h["momentum"] * buf if h["nesterov"] else buf
    return p - h["lr"] * move, {**s, "momentum_buffer": buf}


def adam(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    p, g = _decay(p, _signed(g, h), h)
    s = _moments(g, s, h)
    t, v = s["step"], s["exp_avg_sq"]
    if h["amsgrad"]:
        v = torch.maximum(s.get("max_exp_avg_sq", torch.zeros_like(v)), v)
        s["max_exp_avg_sq"] = v
    correct1, correct2 = 1 - h["betas"][0] ** t, 1 - h["betas"][1] ** t
    return p - h["lr"] / correct1 * s["exp_avg"] / (safe_sqrt(v) / correct2**0.5 + h["eps"]), s


def adamw(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    return adam(p, g, s, {**h, "decoupled_weight_decay": True})


def nadam(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    p, g = _decay(p, _signed(g, h), h)
    s = _moments(g, s, h)
    t, (beta1, beta2) = s["step"], h["betas"]
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * h["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * h["momentum_decay"]))
    product = s["mu_product"] = s.get("mu_product", 1.0) * mu
    denom = safe_sqrt(s["exp_avg_sq"] / (1 - beta2**t)) + h["eps"]
    move = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * s["exp_avg"]
    return p - h["lr"] * move / denom, s


def radam(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    p, g = _decay(p, _signed(g, h), h)
    s = _moments(g, s, h)
    t, (beta1, beta2) = s["step"], h["betas"]
    mean, correct2 = s["exp_avg"] / (1 - beta1**t), 1 - beta2**t
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * t * beta2**t / correct2
    if rho <= 5:
        return p - h["lr"] * mean, s
    rect = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
    return p - h["lr"] * mean * rect * correct2**0.5 / (safe_sqrt(s["exp_avg_sq"]) + h["eps"]), s


def adamax(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    g = _l2(p, _signed(g, h), h)
    (beta1, beta2), t = h["betas"], int(s.get("step", 0)) + 1
    m = beta1 * s.get("exp_avg", torch.zeros_like(g)) + (1 - beta1) * g
    u = torch.maximum(beta2 * s.get("exp_inf", torch.zeros_like(g)), g.abs() + h["eps"])
    return p - h["lr"] / (1 - beta1**t) * m / u, {"step": t, "exp_avg": m, "exp_inf": u}


def adagrad(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    g = _l2(p, _signed(g, h), h)
    t = int(s.get("step", 0)) + 1
    total = s.get("sum", torch.full_like(g, h["initial_accumulator_value"])) + g * g
    rate = h["lr"] / (1 + (t - 1) * h["lr_decay"])
    return p - rate * g / (safe_sqrt(total) + h["eps"]), {"step": t, "sum": total}


def adadelta(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    g = _l2(p, _signed(g, h), h)
    zero, rho = torch.zeros_like(g), h["rho"]
    square = rho * s.get("square_avg", zero) + (1 - rho) * g * g
    acc = s.get("acc_delta", zero)
    delta = safe_sqrt(acc + h["eps"]) / safe_sqrt(square + h["eps"]) * g
    acc = rho * acc + (1 - rho) * delta * delta
    return p - h["lr"] * delta, {"step": int(s.get("step", 0)) + 1, "square_avg": square, "acc_delta": acc}


def asgd(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    g = _l2(p, _signed(g, h), h)
    t = int(s.get("step", 0)) + 1
    eta, mu, ax = s.get("eta", h["lr"]), s.get("mu", 1.0), s.get("ax", torch.zeros_like(p))
    p = p * (1 - h["lambd"] * eta) - eta * g
    return p, {
        "step": t,
        "eta": h["lr"] / (1 + h["lambd"] * h["lr"] * t) ** h["alpha"],
        "mu": 1 / max(1, t - h["t0"]),
        "ax": ax + mu * (p - ax),
    }


def rmsprop(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    g = _l2(p, _signed(g, h), h)
    zero, a = torch.zeros_like(g), h["alpha"]
    square = a * s.get("square_avg", zero) + (1 - a) * g * g
    s = {**s, "step": int(s.get("step", 0)) + 1, "square_avg": square}
    if h["centered"]:
        mean = s["grad_avg"] = a * s.get("grad_avg", zero) + (1 - a) * g
        square = square - mean * mean
    move = g / (safe_sqrt(square) + h["eps"])
    if h["momentum"] != 0:
        move = s["momentum_buffer"] = h["momentum"] * s.get("momentum_buffer", zero) + move
    return p - h["lr"] * move, s


def adafactor(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
    """Adafactor as torch writes it; the norms it reads with `.item()` are differentiated too."""
    g = _signed(g, h)
    t, (eps1, eps2) = int(s.get("step", 0)) + 1, h["eps"]
    eps1 = torch.finfo(p.dtype).eps if eps1 is None else eps1
    new = t ** h["beta2_decay"]
    rate = min(h["lr"], 1 / t**0.5) * (safe_norm(p) / p.numel() ** 0.5).clamp(min=eps2)
    p = p * (1 - h["lr"] * h["weight_decay"])
    s = {**s, "step": t}
    if g.dim() > 1:
        for name, dim in (("row_var", -1), ("col_var", -2)):
            mean = (g * g).mean(dim, keepdim=True)
            s[name] = (1 - new) * s.get(name, torch.zeros_like(mean)) + new * mean
        row, col = s["row_var"], s["col_var"]
        var = row @ col / row.mean(-2, keepdim=True).clamp(min=eps1)
    else:
        var = s["variance"] = (1 - new) * s.get("variance", torch.zeros_like(g)) + new * g * g
    update = g * var.clamp(min=eps1 * eps1).rsqrt()
    clip = (safe_norm(update) / (update.numel() ** 0.5 * h["d"])).clamp(min=1.0)
    return p - rate / clip * update, s


RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adamw,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.Adamax: adamax,
    torch.optim.Adagrad: adagrad,
    torch.optim.Adadelta: adadelta,
    torch.optim.ASGD: asgd,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adafactor: adafactor,
}


def hyper(cls: type[torch.optim.Optimizer], given: Hyper) -> dict[str, Any]:
    """`given` completed with the defaults of torch's own constructor."""
    signature = inspect.signature(cls.__init__).parameters
    defaults = {n: p.default for n, p in signature.items() if p.default is not p.empty}
    return {**defaults, **given}
