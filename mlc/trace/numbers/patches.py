"""What is replaced while recording so that Python's own libraries keep a number's link, or write it as it is.

``math`` (also on tensors: ``math.exp(loss)``) and the means of ``statistics`` and NumPy keep the link; a name that was
imported from there earlier gets the exact value, guarded.  JSON and ``torch.save`` write the plain number.
"""

from __future__ import annotations

import contextlib
import functools
import json.encoder
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.serialization
from torch import Tensor

from mlc.trace.numbers.ending import observed
from mlc.trace.numbers.links import Linked, alive, apply, constant, pin, plain, test
from mlc.trace.numbers.rules import MATH, TESTS, Form, Rule, cast

__all__ = ["followed"]


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """Install the replacements for the time of a recording."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements():
            old = getattr(owner, name)
            setattr(owner, name, functools.wraps(old)(value))
            stack.callback(setattr, owner, name, old)
        yield


def _replacements() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    for name in MATH:
        yield math, name, _function(MATH[name], getattr(math, name))
    for name in TESTS:
        yield math, name, _question(name, getattr(math, name))
    for name, link in _STATISTICS.items():
        yield statistics, name, _summary(name, getattr(statistics, name), link)
    np = sys.modules.get("numpy")
    if np is not None:
        for name, link in _SUMMARIES.items():
            yield np, name, _summary(name, getattr(np, name), link)
    encoder = json.encoder
    for owner, name in ((encoder.JSONEncoder, "encode"), (encoder.JSONEncoder, "iterencode")):
        yield owner, name, _written(getattr(owner, name), 1)
    for name in ("c_make_encoder", "_make_iterencode"):
        if getattr(encoder, name, None) is not None:
            yield encoder, name, _encoder(getattr(encoder, name))
    for module, cls, names in _SINKS:
        sink: Any = sys.modules.get(module)
        sink = getattr(sink, cls, None) if cls else sink
        for name in names:
            if hasattr(sink, name):
                yield sink, name, _written(getattr(sink, name), None)
    for name in ("_save", "_legacy_save"):
        if hasattr(torch.serialization, name):
            yield torch.serialization, name, _written(getattr(torch.serialization, name), 0)


_SINKS = (
    ("torch.utils.tensorboard.writer", "SummaryWriter", ("add_scalar", "add_scalars", "add_hparams", "add_histogram")),
    ("tensorboardX.writer", "SummaryWriter", ("add_scalar", "add_scalars", "add_hparams", "add_histogram")),
    ("wandb.sdk.wandb_run", "Run", ("log",)),
    ("mlflow", "", ("log_metric", "log_metrics", "log_param", "log_params")),
)
"""Loggers that turn what they are given into arrays: they only write it (module, class, methods)."""


def _read(x: object) -> Any:
    """A tensor of one element as the number it is for ``math`` (linked if it is recorded)."""
    if type(x) is Tensor and x.numel() == 1 and not x.is_complex():
        return x.item()
    return x


def _function(rule: Rule, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: object) -> Any:
        given = [_read(x) for x in args]
        if any(alive(x) for x in given) and all(isinstance(x, Linked) or constant(x) for x in given):
            return apply(rule, *given)
        return original(*(plain(x) if not alive(x) else x for x in given))

    return call


def _question(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: object) -> Any:
        x = _read(x)
        return test(name, original, x) if alive(x) else original(plain(x))

    return call


def _middle(t: Tensor) -> Tensor:
    ordered, n = torch.sort(t).values, t.numel()
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def _spread(f: Callable[..., Tensor], correction: int) -> Callable[[Tensor], Tensor]:
    return lambda t: f(t, correction=correction)


_SUMMARIES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean, "average": torch.mean, "sum": torch.sum, "median": _middle,
    "std": _spread(torch.std, 0), "var": _spread(torch.var, 0),
    "max": torch.amax, "min": torch.amin, "amax": torch.amax, "amin": torch.amin,
}  # fmt: skip
_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "fmean": torch.mean,
    "median": _middle,
    "stdev": _spread(torch.std, 1),
    "variance": _spread(torch.var, 1),
    "pstdev": _spread(torch.std, 0),
    "pvariance": _spread(torch.var, 0),
}


def _summary(name: str, original: Callable[..., Any], link: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """One number of a list of numbers; anything else is as it was."""

    def form(kind: torch.dtype, *items: object) -> Form | None:
        if kind != torch.float64:
            return None

        def stacked(*given: Any) -> Tensor:
            device = next(x.device for x in given if isinstance(x, Tensor))
            floats = (cast(x, kind) if isinstance(x, Tensor) else torch.tensor(float(x), dtype=kind) for x in given)
            return link(torch.stack([x.to(device) for x in floats]))

        return Form(stacked)

    def call(*args: Any, **kwargs: object) -> Any:
        data = args[0] if args else ()
        if isinstance(data, Iterator) and not isinstance(data, Tensor):
            args = (data := list(data), *args[1:])
        holds = isinstance(data, (list, tuple)) or type(data).__name__ == "deque"
        if not holds or not any(alive(x) for x in data):
            return original(*args, **kwargs)
        if len(args) == 1 and not kwargs and all(isinstance(x, Linked) or constant(x) for x in data):
            container: Any = type(data) if type(data) in (list, tuple) else list
            return apply(Rule(name, lambda *xs: original(container(xs)), form), *data)
        whole = [pin(x, f"an operand of {name}") if isinstance(x, Linked) else x for x in data]
        return original(whole, *args[1:], **kwargs)

    return call


def _written(original: Callable[..., Any], at: int | None) -> Callable[..., Any]:
    """A function that writes its argument number ``at`` (all of them: None)."""

    def call(*args: object, **kwargs: object) -> Any:
        given = (observed(a) if at in (None, i) else a for i, a in enumerate(args))
        return original(*given, **({k: observed(v) for k, v in kwargs.items()} if at is None else kwargs))

    return call


def _encoder(original: Callable[..., Any]) -> Callable[..., Any]:
    """A maker of JSON encoders: numbers that a user's own ``default`` gives, or meets, are plain."""

    def make(markers: object, default: Callable[[Any], Any], *args: object, **kwargs: object) -> Any:
        def ours(x: object) -> Any:
            return x.value if isinstance(x, Linked) else observed(default(x))

        return original(markers, ours, *args, **kwargs)

    return make
