"""One step of a block: its body's training, the hypergradients of its heads, their updates.

The order of a step: levels with a cold start go back to their beginning; batches are drawn; the compiled loop runs
the body and gives the heads' losses; these are differentiated through it; levels with roll-back return to where they
stood; the heads step (clip, optimizer, scheduler); levels with roll-back take their steps again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from mlc.api import plan, trace
from mlc.ir.program import Program
from mlc.passes.planning.options import planning
from mlc.training.compiled import Compiled
from mlc.training.data.drawing import Drawn, draw, peek
from mlc.training.level import Level
from mlc.training.order.blocks import Block
from mlc.training.order.loops import Loop, apply_gradients, loop_of, training_of
from mlc.training.order.reading import Reading
from mlc.training.state.optimizer import OptimizerState
from mlc.training.state.start import Start
from mlc.view.plan import Plan

__all__ = ["Stepper", "Turn"]


class Turn:
    """Heads that step at once over a body.

    Attributes:
        heads: The levels that step.
        loop: The loop that is run for a step.
        compiled: The same, compiled; None for a level of its own far below the top, which is trained as it is.
    """

    def __init__(self, block: Block, heads: Sequence[Level], readings: Mapping[Level, Reading],
                 starts: dict[Level, Start], options: dict[str, Any] | None) -> None:  # fmt: skip
        self.body = block.body
        self.heads = tuple(heads)
        self.loop: Loop = loop_of(block, heads, starts)
        self.compiled = None if options is None else Compiled(self.loop.function, options)
        self.constants = _constants(self.loop.levels, readings)
        self._starts = starts
        self._cold = [h for b in block.body for h in b.heads if h.cold]
        self._again = [(b, training_of(b, starts)) for b in block.body if any(h.rollback for h in b.heads)]
        self._written = {h: list(readings[h].written.values()) for b, _ in self._again for h in b.heads}

    def arguments(self) -> tuple[Any, ...]:
        """Arguments of the loop, of first batches; nothing is drawn."""
        found = peek(self.body, self.heads, self._starts)
        return tuple(found.items[x] for x in self.loop.levels)

    def traced(self) -> Program:
        """The program of a step, without making one."""
        drawn = peek(self.body, self.heads, self._starts)
        with held(self.constants), drawn.rates():
            return trace(self.loop.function, *[drawn.items[x] for x in self.loop.levels])

    def planned(self) -> Plan:
        """Its plan."""
        assert self.compiled is not None
        return plan(self.traced(), **planning(self.compiled.options))

    def step(self) -> dict[str, float | Tensor]:
        """One step; the losses by level."""
        for h in self._cold:
            self._starts[h].put()
        before = [_Before(h, self._written[h]) for b, _ in self._again for h in b.heads]
        drawn = draw(self.body, self.heads, self._starts)
        values = self._gradients(drawn)
        for x in before:
            x.put()
        for h in self.heads:
            update(h)
        for _, training in self._again:
            with drawn.rates():
                training.function(*[drawn.items[x] for x in training.levels])
        return values

    def _gradients(self, drawn: Drawn) -> dict[str, float | Tensor]:
        """Hypergradients into the heads' ``.grad``."""
        function = self.loop.function if self.compiled is None else self.compiled
        with held(self.constants):
            with drawn.rates():
                losses, values = function(*[drawn.items[x] for x in self.loop.levels])
            for k, h in enumerate(self.heads):
                more = k + 1 < len(self.heads)
                apply_gradients(h.params, _gradient(losses[k], h, more))
        return {**values, **{h.name: x.detach() for h, x in zip(self.heads, losses, strict=True)}}


class Stepper:
    """A block of the outermost row, step by step.

    Attributes:
        block: The block.
        turns: Its turns, in order.
    """

    def __init__(self, block: Block, readings: Mapping[Level, Reading], starts: dict[Level, Start],
                 options: dict[str, Any] | None) -> None:  # fmt: skip
        self.block = block
        self.turns = [Turn(block, heads, readings, starts, options) for heads in block.turns()]
        self._starts = starts

    def step(self) -> dict[str, float | Tensor]:
        """All steps of the block for one step of the training; the last losses by level."""
        for h in self.block.heads:
            if h.cold:
                self._starts[h].put()
        values: dict[str, float | Tensor] = {}
        for turn in self.turns:
            for _ in range(turn.heads[0].steps):
                values |= turn.step()
        return values


class _Before:
    """A level as it stood before its steps, with what its loss writes to."""

    def __init__(self, level: Level, written: Sequence[Tensor]) -> None:
        self.level = level
        self.tensors = [(t, t.detach().clone()) for t in (*level.params, *written)]
        self.optimizer = OptimizerState.of(level.optimizer)

    def put(self) -> None:
        rates = [g["lr"] for g in self.level.optimizer.param_groups]  # where the scheduler has come to
        with torch.no_grad():
            for t, value in self.tensors:
                t.copy_(value)
        self.optimizer.put(self.level.optimizer, {id(x) for x in rates if isinstance(x, Tensor)})
        for group, rate in zip(self.level.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def update(level: Level) -> None:
    """Clip, optimizer step, scheduler step, as they stand in an ordinary loop."""
    if isinstance(level.clip, float):
        clip_grad_norm_(level.params, level.clip)
    elif level.clip is not None:
        level.clip(level.params)
    level.optimizer.step()
    if level.scheduler is not None:
        level.scheduler.step()


def _gradient(loss: Tensor, level: Level, more: bool) -> Sequence[Tensor | None]:
    if not loss.requires_grad:
        raise level.refuse(
            "at this step its loss carries no derivative", "a loss that depends on the parameters at every step"
        )
    return torch.autograd.grad(loss, level.params, retain_graph=more, allow_unused=True)


def _constants(levels: Sequence[Level], readings: Mapping[Level, Reading]) -> list[Tensor]:
    """Leaves that require grad and are read, but trained by none of these levels: constants of the loop."""
    found: dict[int, Tensor] = {}
    for x in levels:
        found.update({id(t): t for t in readings[x].free})
        found.update({id(p): p for y in readings[x].values if y not in levels for p in y.params})
    return list(found.values())


@contextlib.contextmanager
def held(constants: Sequence[Tensor]) -> Iterator[None]:
    """Tensors require no grad inside: nothing is computed for them."""
    for t in constants:
        t.requires_grad_(False)
    try:
        yield
    finally:
        for t in constants:
            t.requires_grad_(True)
