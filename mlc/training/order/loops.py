"""The loop that a block of levels stands for, as Python source.

A block becomes one ordinary function: its body's training loops, each under ``with mlc.level(name, response)``, then
the losses of its heads.  That function is what is compiled, so budgets, plans, pictures and ``mlc.check`` apply to it
as to any loop of the user's; ``print(training.source)`` shows it, and errors and plans name its lines.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from mlc.trace.levels import level as declared
from mlc.trace.python.frames import GENERATED
from mlc.training.level import Level
from mlc.training.order.blocks import Block
from mlc.training.state.start import Start

__all__ = ["Loop", "apply_gradients", "loop_of", "training_of"]


@dataclass(frozen=True, eq=False)
class Loop:
    """A function made from levels.

    Attributes:
        function: Takes each level's batches by name (:meth:`~mlc.training.engine.Training` draws them).
        levels: Levels whose batches it takes, in order of the arguments.
        source: Its text.
    """

    function: Callable[..., Any]
    levels: tuple[Level, ...]
    source: str


def loop_of(block: Block, heads: Sequence[Level], starts: Mapping[Level, Start]) -> Loop:
    """The body of a block, then the losses of some of its heads.

    The function returns ``(losses of the heads, {name: last loss} of the body's levels)``.
    """
    return _Writer(block.name, [*block.inner(), *heads], starts).loop(block.body, heads)


def training_of(block: Block, starts: Mapping[Level, Start]) -> Loop:
    """The training of a block alone, as it runs inside of another's function; it returns ``{name: last loss}``."""
    return _Writer(block.name, list(block.levels()), starts).loop((block,), ())


def apply_gradients(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Put gradients where an optimizer reads them."""
    for p, g in zip(params, gradients, strict=True):
        p.grad = g


def _add(total: Sequence[Tensor | None] | None, more: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Sums of gradients; None where there is none."""
    if total is None:
        return more
    with torch.no_grad():
        pairs = zip(total, more, strict=True)
        return [b if a is None else a if b is None else a + b for a, b in pairs]


def _set_rates(optimizer: Optimizer, rates: Sequence[Tensor]) -> None:
    """Learning rates of one step, one for each parameter group."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _restart(params: Sequence[Tensor], initial: Sequence[Tensor], optimizer: Optimizer) -> None:
    """Parameters as at the beginning, and an optimizer that has done nothing."""
    with torch.no_grad():
        for p, value in zip(params, initial, strict=True):
            p.copy_(value)
    optimizer.state.clear()


class _Writer:
    """Writes one function."""

    def __init__(self, title: str, levels: Sequence[Level], starts: Mapping[Level, Start]) -> None:
        self.title = title
        self.starts = starts
        self.levels = tuple(levels)
        self.names = _identifiers(self.levels)
        self.lines: list[str] = []
        self.scope: dict[str, Any] = {
            "torch": torch, "level": declared, "apply_gradients": apply_gradients, "add": _add,
            "set_rates": _set_rates, "restart": _restart, "clip_grad_norm_": clip_grad_norm_,
        }  # fmt: skip
        self.rates = {x for x in self.levels if x.scheduler is not None}

    def loop(self, body: Sequence[Block], heads: Sequence[Level]) -> Loop:
        """The function with this body, returning the losses of the heads."""
        name = "step_of_" + re.sub(r"\W", "_", self.title)
        arguments = ", ".join(f"{self.names[x]}_data" for x in self.levels)
        self.write(0, f"def {name}({arguments}):")
        logged = [x for b in body for x in b.levels()]
        for b in body:
            self.block(b, 1, "", outermost=True)
        for h in heads:
            self.rates.discard(h)
            self.value(h, 1, f"{self.names[h]}_data")
        last = ", ".join(f"{x.name!r}: {self.names[x]}_loss.item()" for x in logged)
        values = "".join(f"{self.names[h]}_loss, " for h in heads)
        self.write(1, f"return ({values}), {{{last}}}" if heads else f"return {{{last}}}")
        return self.made(name)

    def made(self, name: str) -> Loop:
        source = "\n".join(self.lines) + "\n"
        file = f"{GENERATED}{self.title}>"
        known = linecache.cache.get(file)
        if known is not None and "".join(known[2]) != source:  # type: ignore[misc]
            file = f"{GENERATED}{self.title}, {abs(hash(source)) % 10**6}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec"), self.scope)
        return Loop(self.scope[name], self.levels, source)

    def write(self, depth: int, line: str) -> None:
        self.lines.append("    " * depth + line)

    def name(self, x: Level, what: str, value: Any) -> str:
        """A name of the function's scope for something of a level's."""
        key = f"{self.names[x]}_{what}"
        self.scope[key] = value
        return key

    # ---- blocks

    def block(self, b: Block, depth: int, at: str, outermost: bool = False) -> None:
        """A block's training; ``at`` indexes the batches of the loops around it."""
        for h in b.heads:
            if h.cold and not outermost:
                initial = self.name(h, "initial", self.starts[h].params)
                params, optimizer = self.name(h, "params", h.params), self.name(h, "optimizer", h.optimizer)
                self.write(depth, f"restart({params}, {initial}, {optimizer})")
        response = ""
        if b.heads[0].response is not None:
            response = ", " + self.name(b.heads[0], "response", b.heads[0].response)
        self.write(depth, f"with level({b.name!r}{response}):")
        for k, heads in enumerate(b.turns()):
            below = f"{at}[{k}]" if b.alternating else at
            self.turn(b.body, heads, depth + 1, at, below)

    def turn(self, body: Sequence[Block], heads: Sequence[Level], depth: int, at: str, below: str) -> None:
        """Steps of levels that step at once; ``below`` indexes the batches of their body."""
        steps, index = heads[0].steps, f"i{depth}"
        if not body and len(heads) == 1 and (heads[0].feed.given or heads[0] in self.rates):
            self.write(depth, f"for item in {self.names[heads[0]]}_data{at}:")
            items = ["item"]
        else:
            self.write(depth, f"for {index} in range({steps}):")
            items = [f"{self.names[h]}_data{at}[{index}]" for h in heads]
        for b in body:
            self.block(b, depth + 1, f"{below}[{index}]")
        for h, item in zip(heads, items, strict=True):
            self.gradient(h, depth + 1, item)
        for h in heads:
            self.update(h, depth + 1)

    def gradient(self, h: Level, depth: int, item: str) -> None:
        """A level's gradient on one item of its data."""
        n, params = self.names[h], self.name(h, "params", h.params)
        if h in self.rates:
            self.write(depth, f"{n}_batch, {n}_rates = {item}" if h.feed.given else f"{n}_rates = {item}")
            item = f"{n}_batch"
        grad = f"torch.autograd.grad({{}}, {params}, allow_unused=True)"
        if h.accumulate == 1:
            self.value(h, depth, item)
            self.write(depth, f"{n}_gradient = {grad.format(f'{n}_loss')}")
            return
        self.write(depth, f"{n}_gradient, {n}_loss = None, 0.0")
        self.parts(h, depth, item)
        self.write(depth + 1, f"{n}_part = {self.call(h, 'part')} / {h.accumulate}")
        self.write(depth + 1, f"{n}_gradient = add({n}_gradient, {grad.format(f'{n}_part')})")
        self.write(depth + 1, f"{n}_loss = {n}_loss + {n}_part.detach()")

    def value(self, h: Level, depth: int, item: str) -> None:
        """A level's loss on one item of its data."""
        n = self.names[h]
        if h.accumulate == 1:
            self.write(depth, f"{n}_loss = {self.call(h, item)}")
            return
        self.write(depth, f"{n}_loss = 0.0")
        self.parts(h, depth, item)
        self.write(depth + 1, f"{n}_loss = {n}_loss + {self.call(h, 'part')} / {h.accumulate}")

    def parts(self, h: Level, depth: int, item: str) -> None:
        """The loop over the batches of one step."""
        self.write(depth, f"for part in {item}:" if h.feed.given else f"for part in range({h.accumulate}):")

    def call(self, h: Level, item: str) -> str:
        """A call of a level's loss."""
        given = "" if not h.takes_batch else item if h.feed.given else "None"
        return f"{self.name(h, 'objective', h.loss)}({given})"

    def update(self, h: Level, depth: int) -> None:
        """A level's step."""
        n, params = self.names[h], self.name(h, "params", h.params)
        optimizer = self.name(h, "optimizer", h.optimizer)
        self.write(depth, f"apply_gradients({params}, {n}_gradient)")
        if h in self.rates:
            self.write(depth, f"set_rates({optimizer}, {n}_rates)")
        if isinstance(h.clip, float):
            self.write(depth, f"clip_grad_norm_({params}, {h.clip})")
        elif h.clip is not None:
            self.write(depth, f"{self.name(h, 'clip', h.clip)}({params})")
        self.write(depth, f"{optimizer}.step()")


def _identifiers(levels: Sequence[Level]) -> dict[Level, str]:
    """A Python name for each level."""
    out: dict[Level, str] = {}
    for x in levels:
        base = re.sub(r"\W", "_", x.name)
        base = base if base[0].isalpha() else f"level_{base}"
        name, k = base, 2
        while name in out.values():
            name, k = f"{base}_{k}", k + 1
        out[x] = name
    return out
