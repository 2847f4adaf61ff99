"""What one call of a block's loop is fed with: batches of every level, and learning rates of those with a scheduler.

Everything is drawn before the call, in the order in which the loop uses it.  A scheduler is run ahead, and its rates
enter the loop as tensors, one set for each step: a program that holds them as numbers would be another one at every
call.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.training.level import Level
from mlc.training.order.blocks import Block
from mlc.training.state.start import Start

__all__ = ["Drawn", "draw", "peek"]


class Drawn:
    """Items for each level of a call, and the learning rates that stand when it is over."""

    def __init__(self) -> None:
        self.items: dict[Level, Any] = {}
        self._rates: dict[Level, list[Any]] = {}
        self._first: dict[Level, list[Tensor]] = {}

    def note(self, level: Level, rates: list[Tensor]) -> None:
        """Rates of a step."""
        self._first.setdefault(level, rates)

    @contextlib.contextmanager
    def rates(self) -> Iterator[None]:
        """Learning rates are tensors inside, and numbers again afterwards: those that the schedulers came to."""
        ends = {x: [g["lr"] for g in x.optimizer.param_groups] for x in self._first}
        _put(self._first)
        try:
            yield
        finally:
            _put(ends)


def _put(rates: dict[Level, Any]) -> None:
    for x, values in rates.items():
        for group, value in zip(x.optimizer.param_groups, values, strict=True):
            group["lr"] = value


def draw(body: Sequence[Block], heads: Sequence[Level], starts: dict[Level, Start]) -> Drawn:
    """Batches and rates for one call: a body's, then those of the heads."""
    out = Drawn()
    out.items = _body(body, starts, out, _batches)
    for h in heads:
        out.items[h] = _batches(h)
    return _apart(out)


def peek(body: Sequence[Block], heads: Sequence[Level], starts: dict[Level, Start]) -> Drawn:
    """The like of :func:`draw`, of first batches; nothing is drawn, and schedulers stay where they are."""
    first: dict[Level, Any] = {}

    def batches(x: Level) -> Any:
        if x not in first:
            first[x] = x.feed.peek()
        return first[x] if x.accumulate == 1 else [first[x]] * x.accumulate

    out = Drawn()
    with _standing([x for b in body for x in b.levels()]):
        out.items = _body(body, starts, out, batches)
    for h in heads:
        out.items[h] = batches(h)
    return _apart(out)


@contextlib.contextmanager
def _standing(levels: Sequence[Level]) -> Iterator[None]:
    """Schedulers, and the learning rates that they set, are put back."""
    scheduled = [(x.scheduler, x.optimizer) for x in levels if x.scheduler is not None]
    before = [(dict(s.state_dict()), [g["lr"] for g in o.param_groups]) for s, o in scheduled]
    try:
        yield
    finally:
        for (s, o), (state, rates) in zip(scheduled, before, strict=True):
            s.load_state_dict(state)
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate


def _batches(x: Level) -> Any:
    """Data of one step."""
    return x.feed.draw() if x.accumulate == 1 else [x.feed.draw() for _ in range(x.accumulate)]


def _body(body: Sequence[Block], starts: dict[Level, Start], out: Drawn, batches: Any) -> dict[Level, Any]:
    """Items of a body's levels, nested as its loops are."""
    items: dict[Level, Any] = {}
    for b in body:
        for h in b.heads:
            if h.cold:
                starts[h].rewind()
        inner: list[list[dict[Level, Any]]] = []
        for heads in b.turns():
            steps: list[dict[Level, Any]] = []
            for _ in range(heads[0].steps):
                steps.append(_body(b.body, starts, out, batches))
                for h in heads:
                    items.setdefault(h, []).append(_item(h, out, batches))
            inner.append(steps)
        for x in b.inner():
            turns = [[step[x] for step in steps] for steps in inner]
            items[x] = turns if b.alternating else turns[0]
    return items


def _item(h: Level, out: Drawn, batches: Any) -> Any:
    batch = batches(h)
    if h.scheduler is None:
        return batch
    groups = h.optimizer.param_groups
    rates = [torch.as_tensor(g["lr"], dtype=torch.float64).detach().clone() for g in groups]
    others = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in groups]
    h.optimizer._opt_called = True  # type: ignore[attr-defined]  # else PyTorch warns: the loop's steps come later
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        h.scheduler.step()
    for before, g in zip(others, groups, strict=True):
        changed = [k for k, v in before.items() if isinstance(v, (int, float, tuple)) and g[k] != v]
        if changed:
            raise h.refuse(f"its scheduler changes {changed[0]!r}, not the learning rate alone", "cycle_momentum=False")
    out.note(h, rates)
    return (batch, rates) if h.feed.given else rates


def _apart(out: Drawn) -> Drawn:
    """Tensors that occur twice get memory of their own: which ones do is part of what a program was traced for."""
    seen: set[int] = set()

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.layout is not torch.strided or type(x) is not Tensor:
            return x
        memory = x.untyped_storage()._cdata
        if memory in seen:
            return x.detach().clone() if not x.requires_grad else x
        seen.add(memory)
        return x

    out.items = {x: pytree.tree_map(own, items) for x, items in out.items.items()}
    return out
