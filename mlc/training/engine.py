"""The training that levels make: :class:`Training`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mlc.compiled.compiled import CompiledFunction
from mlc.errors import TrainingError
from mlc.training.feeding import Start
from mlc.training.level import Level, names_of, shape_of
from mlc.training.order import arrange, flat
from mlc.training.reading import read
from mlc.training.stepping import Stepper

class Training:
    def __init__(self, levels: Any, *, memory: Any = None, precision: Any = None, mesh: Any = None,
                 callbacks: Sequence[Callable[..., Any]] = (), logger: Any = None) -> None:
        self.levels = flat(levels)
        readings = {x: read(x, self.levels) for x in self.levels}
        self.blocks = arrange(levels, list(readings.values()))
        starts = {x: Start(x) for x in self.levels}
        options = dict(memory=memory, backend="auto", stop_gradient="all", flows=None, precision=precision, mesh=mesh, levers=None, verify="values")
        self._steppers = [Stepper(b, readings, starts, options if b.body or b is self.blocks[-1] else None) for b in self.blocks]
    def run(self, steps):
        for _ in range(steps):
            for s in self._steppers: v = s.step()
        return v
    def __str__(self): return "\n".join(l for b in self.blocks for l in b.lines())
    @property
    def program(self): return self._steppers[-1].turns[-1].compiled.program
