"""Optimizer steps while tracing: which are differentiable, and how their step is made visible.

For the duration of a recorded step the groups' flags select PyTorch's plain all-tensor path (``foreach``, ``fused``
and host-side scalars off); the flags and everything else of the user's optimizer are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import optim

from mlc.errors import CaptureError
from mlc.trace.recorder.observer import Observer
from mlc.trace.recorder.tracer import Tracer

__all__ = ["after_step", "before_step", "hook_classes", "narrow_counts", "restore_flags"]

_REFUSED: dict[str, tuple[str, str]] = {
    "SparseAdam": ("SparseAdam works on sparse gradients", "use Adam with Embedding(sparse=False)"),
}
# Where nothing runs, also what decides on values: at a real call these decisions are guards.
_UNKNOWN = {
    "LBFGS": (
        "LBFGS evaluates its closure a data-dependent number of times and branches on the results",
        "trace without fake=True, or use a first-order optimizer in the inner loop",
    ),
    **_REFUSED,
}


def hook_classes() -> None:
    """Do to every class of optimizers what PyTorch does when its first instance is made: wrap ``step``, once.

    A class of the user's that is first used inside of the call would else be something that the call changes.
    """
    todo = list(optim.Optimizer.__subclasses__())
    while todo:
        cls: Any = todo.pop()
        todo += cls.__subclasses__()
        if cls.step is not optim.Optimizer.step and not getattr(cls.step, "hooked", None):
            cls.step = optim.Optimizer.profile_hook_step(cls.step)
            cls.step.hooked = True


def _flags(group: dict[str, Any]) -> dict[str, Any]:
    wanted: dict[str, Any] = {"foreach": False, "fused": False, "differentiable": True}
    return {k: v for k, v in wanted.items() if k in group}


def before_step(tracer: Tracer, active: Callable[[], bool]) -> Callable[..., None]:
    """Hook that prepares an optimizer for a recorded step."""

    def hook(opt: optim.Optimizer, args: object, kwargs: object) -> None:
        if not active():
            return
        for cls in type(opt).__mro__:
            if cls.__module__.startswith("torch.optim") and cls.__name__ in (
                _REFUSED if isinstance(tracer, Observer) else _UNKNOWN
            ):
                what, advice = _UNKNOWN[cls.__name__]
                raise CaptureError(f"{what}; it cannot be differentiated through", loc=tracer.place(), advice=advice)
        saved = []
        for group in opt.param_groups:
            flags = _flags(group)
            if isinstance(tracer, Observer) and _at_rest(tracer, opt, group):
                flags.pop("differentiable", None)
            saved.append((group, {k: group[k] for k in flags}))
            if group.get("fused"):
                tracer.fused.update(id(p) for p in group["params"])
            group.update(flags)
            if isinstance(opt, optim.SGD):
                _start_momentum(opt, group)
            if isinstance(tracer, Observer):
                tracer.reloaded(_hyperparameters(group))
        tracer.flags.append(saved)
        tracer.step_begins(opt)
        _widen_counts(tracer, opt)
        tracer.dtypes.append(torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)

    return hook


def _at_rest(tracer: Tracer, opt: optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the learning rate is exactly 0 where PyTorch's all-tensor formula divides by it.

    Every warm-up starts there; the formula with Python numbers is right then.  (A rate that is a tensor keeps the
    all-tensor formula, whose derivative :mod:`mlc.passes.rolling.quotients` makes right; see :func:`after_step`.)
    """
    if not isinstance(opt, (optim.Adam, optim.AdamW)):
        return False
    return not isinstance(group["lr"], torch.Tensor) and bool(group["lr"] == 0)


def _hyperparameters(group: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors among the options of a group."""
    options = [v for k, v in group.items() if k != "params"]
    flat = [x for v in options for x in (v if isinstance(v, (list, tuple)) else [v])]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def _start_momentum(opt: optim.Optimizer, group: dict[str, Any]) -> None:
    """Without dampening the first buffer, the gradient itself, is what a buffer of zeros gives: one loop body."""
    if not group["momentum"] or group["dampening"]:
        return
    for p in group["params"]:
        if p.grad is not None and opt.state[p].get("momentum_buffer") is None:
            with torch.no_grad():
                opt.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _widen_counts(tracer: Tracer, opt: optim.Optimizer) -> None:
    """Step counts in float64 while tracing: PyTorch's eager path computes with them as Python numbers."""
    before = tracer.counts.setdefault(id(opt), (opt, {}))[1]
    with torch.no_grad():
        for p, state in opt.state.items():
            count = state.get("step")
            if isinstance(count, torch.Tensor) and count.dtype == torch.float32 and count.dim() == 0:
                before[p] = count
                state["step"] = count.to(torch.float64)


def narrow_counts(tracer: Tracer) -> None:
    """At the end of a trace: step counts in the type that the user's optimizer keeps them in."""
    dtype = torch.get_default_dtype()
    with torch.no_grad():
        for opt, before in tracer.counts.values():
            for p, state in opt.state.items():
                count = state.get("step")
                if p in before:
                    before[p].copy_(count)
                    state["step"] = before[p]
                elif isinstance(count, torch.Tensor) and count.dim() == 0 and count.dtype == torch.float64:
                    state["step"] = count.to(torch.float32 if id(p) in tracer.fused else dtype)


def _refuse_not_a_number(tracer: Tracer, opt: optim.Optimizer) -> None:
    """PyTorch's all-tensor formula of Adam is 0 / 0 where a rate is a tensor of 0 and a gradient exactly 0."""
    if not isinstance(tracer, Observer) or not isinstance(opt, (optim.Adam, optim.AdamW)):
        return
    with tracer.pause(), torch.no_grad():
        for group in opt.param_groups:
            lr = group["lr"]
            if isinstance(lr, torch.Tensor) and not bool(lr) and any(bool(p.isnan().any()) for p in group["params"]):
                raise CaptureError(
                    "a learning rate that is a tensor is exactly 0 where a gradient is exactly 0, too",
                    loc=tracer.place(),
                    advice="start the warm-up at a small positive rate, or give 0 as a number",
                )


def after_step(tracer: Tracer, active: Callable[[], bool]) -> Callable[..., None]:
    """Hook that ends a recorded step."""

    def hook(opt: optim.Optimizer, args: object, kwargs: object) -> None:
        if active() and tracer.flags:
            _refuse_not_a_number(tracer, opt)
            restore_flags(tracer.flags.pop())
            torch.set_default_dtype(tracer.dtypes.pop())
            tracer.step_ends(opt)

    return hook


def restore_flags(saved: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Put the user's group flags back."""
    for group, flags in saved:
        group.update(flags)
