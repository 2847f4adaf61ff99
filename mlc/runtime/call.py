"""Running lowered programs: forward stage, saved values, backward stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mlc.ir.core import Draw, Eqn, Region, Seed
from mlc.runtime.inductor.lowering import Inductor
from mlc.runtime.interpreter.feeds import Drawer, Stale, feed_runner
from mlc.runtime.interpreter.interpreter import Executable, compile_region
from mlc.runtime.interpreter.loop import link
from mlc.runtime.interpreter.particles import Window
from mlc.runtime.interpreter.recording import Recording, current, each_stage, resumed
from mlc.runtime.interpreter.saved import alias, check_versions, memory, tensors_in, versions
from mlc.runtime.interpreter.solve import Told
from mlc.runtime.interpreter.watching import Watch
from mlc.runtime.products import products_in

__all__ = ["Executor", "Run", "StageGraphs"]


class StageGraphs(Protocol):
    """What the runtime needs of a lowered program (see :class:`mlc.ir.lowered.stages.Stages`)."""

    @property
    def forward(self) -> Region:
        """``inputs -> (results, saved)``."""

    @property
    def backward(self) -> Region | None:
        """``(saved, cotangents) -> hypergradients``."""

    @property
    def n_results(self) -> int:
        """Number of results at the head of the forward stage's outputs."""

    @property
    def saved(self) -> tuple[tuple[str, int], ...]:
        """Where the backward stage's inputs come from."""

    @property
    def cotangents(self) -> tuple[int, ...]:
        """Outputs that have a cotangent."""

    @property
    def gradients(self) -> tuple[int, ...]:
        """Inputs that get a gradient."""


@dataclass
class Run:
    """One call: what is kept between its forward and its backward stage.

    Attributes:
        results: What the forward stage computed.
        saved: What the backward stage reads.
        seconds: By stage.
        lent: Those of ``saved`` that lie in memory of the user's, and their versions.
        peak_bytes: Measured, of both stages.
        first: The measurement in progress.
        told: What was told for the report: linear systems that were solved, estimates from random directions.
    """

    results: list[Any]
    saved: list[Any]
    seconds: dict[str, float] = field(default_factory=dict)
    lent: tuple[list[Any], list[int]] = field(default_factory=lambda: ([], []))
    peak_bytes: int = 0
    first: Recording | None = None
    told: list[Told] = field(default_factory=list)


class Executor:
    """Compiled stages of one program; ``backend`` is ``"interpreter"`` or ``"inductor"``.

    With ``matmul="tf32"`` products of float32 values on CUDA are taken in TensorFloat-32 while a stage runs; the
    settings of the process are as before afterwards.  ``watch`` looks at every value (with the interpreter alone).
    """

    def __init__(
        self, stages: StageGraphs, backend: str = "interpreter", matmul: str = "", watch: Watch | None = None
    ) -> None:
        self.stages = stages
        self.matmul = matmul
        self._drawer: Drawer | None = None
        # The first call measures memory for all: the same graph holds as much in every one.  Segments on trial hold
        # more, so it is measured again once all of them are settled.
        self._first: Recording | None = Recording()
        self._peak = 0
        inductor = Inductor() if backend == "inductor" else None
        self._on_trial = inductor
        compile = inductor or (compile_region if watch is None else watch.compile)
        self._heard: list[Told] = []
        self._window: Window | None = None
        special = link(
            lambda op: feed_runner(op, self._draws), self._draw, compile, self._heard.append, self._particles
        )
        self._forward: Executable = each_stage(compile(stages.forward, special), "forward")
        self._backward: Executable | None = (
            None if stages.backward is None else each_stage(compile(stages.backward, special), "backward")
        )

    def _particles(self) -> Window:
        assert self._window is not None
        return self._window

    def _draws(self) -> Drawer:
        assert self._drawer is not None
        return self._drawer

    def _draw(self, e: Eqn) -> Callable[..., Any] | None:
        if isinstance(e.op, Seed):
            seed = e.op.value

            def set_seed(args: list[Any]) -> list[Any]:
                torch.manual_seed(seed)
                return []

            return set_seed
        if not isinstance(e.op, Draw):
            return None
        op, types = e.op, [v.type for v in e.outs]

        def run(args: list[Any]) -> list[Tensor]:
            try:
                return self._draws().next(op, types)
            except StopIteration:
                raise Stale("an iterable ended earlier than before") from None

        return run

    def forward(self, inputs: Sequence[Any], drawer: Drawer, window: Window | None = None) -> Run:
        """Run the forward stage; user state is not touched.

        Args:
            inputs: Of the program.
            drawer: Draws items.
            window: Particles that the stage goes on with; None: new ones, which are forgotten.
        """
        started = time.perf_counter()
        self._drawer, self._window = drawer, window or Window()
        if self._first is None and self._on_trial is not None and self._on_trial.settled:
            self._first, self._on_trial, self._peak = Recording(), None, 0
        first = self._first if current() is None else None
        try:
            with torch.no_grad(), products_in(self.matmul), resumed(first):
                inputs = [alias(x) for x in inputs]
                outs = self._forward(list(inputs))
        finally:
            self._drawer = self._window = None
        self._measured(first, last=self._backward is None)
        n = self.stages.n_results
        saved = [outs[i] if kind == "out" else inputs[i] for kind, i in self.stages.saved]
        theirs = drawer.memories.union(map(memory, inputs))
        lent = [x for x in tensors_in(saved) if memory(x) in theirs]
        seconds = {"forward": time.perf_counter() - started}
        return Run(outs[:n], saved, seconds, (lent, versions(lent)), self._peak, first, self._told())

    def _told(self) -> list[Told]:
        """What was told since this was asked last."""
        found = self._heard[:]
        self._heard.clear()
        return found

    def _measured(self, first: Recording | None, last: bool) -> None:
        if first is not None:
            self._peak = max(self._peak, first.peak_bytes)
            self._first = None if last else self._first

    def backward(self, run: Run, cotangents: Sequence[Tensor], keep: bool) -> list[Tensor]:
        """Hypergradients in the order of ``stages.gradients``; frees what was saved unless ``keep``."""
        assert self._backward is not None
        started = time.perf_counter()
        check_versions(*run.lent)
        args = [*run.saved, *cotangents]
        if not keep:
            run.saved, run.lent = [], ([], [])
        first, run.first = run.first, None
        with torch.no_grad(), products_in(self.matmul), resumed(first):
            grads = self._backward(args)
        self._measured(first, last=True)
        run.peak_bytes = self._peak
        run.told += self._told()
        run.seconds["backward"] = time.perf_counter() - started
        return grads
