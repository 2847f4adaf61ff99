"""The tracer: a recorder that knows the user's lines and loops, optimizer steps and draws.

What a tensor of the user's is, and what a gradient, differs between its two kinds:
:class:`~mlc.trace.faketracer.FakeTracer` records on fake tensors without running, and
:class:`~mlc.trace.recorder.observer.Observer` records what really runs.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlc.ir.core import Draw, Eqn, Seed, Var
from mlc.ir.lowered.responses import Response
from mlc.ir.origin import Origin
from mlc.ir.types import Loc, TensorType
from mlc.record.recorder import Recorder
from mlc.trace.communication.collectives import COMMUNICATION, communicate
from mlc.trace.python.frames import Site, Sites
from mlc.trace.recorder.externals import External, Step

__all__ = ["Tracer"]


class Tracer(Recorder):
    """Records one call of the user's function."""

    current: ClassVar[Tracer | None] = None
    runs = False  # whether the function really runs meanwhile
    stops = True

    def __init__(self, paths: dict[int, tuple[Any, ...]]) -> None:
        super().__init__(merge=False)
        self.sites = Sites()
        self._here: tuple[Loc | None, Site | None] | None = None
        self.paths = paths
        self.externals: dict[int, External] = {}
        self.grads: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.grad_reads: dict[int, tuple[Tensor, bool]] = {}
        self.steps: list[Step] = []
        self.flags: list[Any] = []
        self.counts: dict[int, Any] = {}
        self.dtypes: list[torch.dtype] = []
        self._open: list[tuple[Origin, bool, int]] = []
        self.grad_eqns: list[Eqn] = []
        self.leaves: dict[int, Tensor] = {}
        self.fused: set[int] = set()  # parameters of fused optimizers: their counts are float32 whatever the default
        self.farther = False  # whether some inner gradients go ways that PyTorch's graph does not have
        self.declared: list[str] = []  # names of the levels (:func:`mlc.level`) that are open
        self.flows: dict[Any, Response] = {}  # what was asked of levels from outside
        self.responses: dict[str, Response | None] = {}  # what was asked of levels there, by name
        self.decisions: list[tuple[Var, Any, str, Loc | None]] = []
        self.roll: Any = None  # roll calls, where there are other processes (see mlc.trace.communication.rollcall)
        self.following = False  # a functional collective runs that PyTorch's graph goes through
        self.opaque: dict[Var, Loc | None] = {}  # made by collectives that PyTorch's graph takes for the identity

    def depth(self) -> int:
        """How many declared levels (:func:`mlc.level`) are open."""
        return len(self.declared)

    def level_name(self, depth: int | None = None) -> str:
        """The name of the innermost declared level that is open, or of the one at this depth; empty without one."""
        depth = len(self.declared) if depth is None else depth
        return self.declared[depth - 1] if 0 < depth <= len(self.declared) else ""

    # ---- places

    def locate(self) -> tuple[Loc | None, Site | None]:
        """See :class:`~mlc.trace.python.frames.Sites`; looked up once per operator."""
        return self.sites.here() if self._here is None else self._here

    def dispatch(self, func: Any, s: Any, special: Any, args: Any, kwargs: object) -> Any:
        """As :meth:`Recorder.dispatch`."""
        before, self._here = self._here, self.sites.here()
        try:
            if func.namespace in COMMUNICATION:
                return communicate(self, func, args, kwargs)
            return super().dispatch(func, s, special, args, kwargs)
        finally:
            self._here = before

    def place(self) -> Loc | None:
        """The user's line now."""
        return self.sites.here()[0]

    def copying(self) -> bool:
        """See :meth:`Recorder.copying`."""
        f: FrameType | None = sys._getframe(2)
        while f is not None and f is not self.sites.base:
            if f.f_code is copy.deepcopy.__code__:
                return True
            f = f.f_back
        return False

    # ---- optimizer steps

    def step_begins(self, opt: torch.optim.Optimizer) -> None:
        """Everything until :meth:`step_ends` is an update."""
        self._open.append((self.tag, self.safe_sqrt, len(self.builder.eqns)))
        self.tag, self.safe_sqrt = Origin.UPDATE, True

    def step_ends(self, opt: torch.optim.Optimizer) -> None:
        """The update is complete."""
        self.tag, self.safe_sqrt, first = self._open.pop()
        self.steps.append(Step(opt, first, len(self.builder.eqns), self.place()))

    # ---- tensors of the user's

    @abstractmethod
    def draw_tensor(self, t: Tensor, var: Var) -> None:
        """A tensor that an iterable of the user's just produced."""

    @abstractmethod
    def set_grad(self, t: Tensor, g: Tensor | None = None) -> None:
        """``t.grad`` is set."""

    @abstractmethod
    def leaf_copy(self, t: Tensor, is_parameter: bool) -> Tensor:
        """A fresh leaf whose value is that of ``t``, derivative included."""

    # ---- draws

    def before_item(self) -> Any:
        """An iterable of the user's is about to run."""
        return None

    def after_item(self, key: tuple[int, int, int], before: object) -> None:
        """An iterable of the user's ran: item ``key[2]`` of its iteration ``key[1]`` (-1: the iteration began)."""

    def unnoticed(self) -> AbstractContextManager[None]:
        """While an iterable of the user's runs: what draws data does so again at later calls, and is not looked at."""
        return contextlib.nullcontext()

    def seed(self, value: int) -> None:
        """``torch.manual_seed`` in the loop."""
        loc, site = self.locate()
        self.builder.append(Eqn(Seed(value), (), (), (), loc, "draw", site))

    def drawn(self, source: int, visit: int, tensors: Sequence[Tensor]) -> None:
        """An iterable produced an item: one equation, one value per tensor in it."""
        loc, site = self.locate()
        outs = tuple(Var(TensorType.of(t)) for t in tensors)
        self.builder.append(Eqn(Draw(source, visit), (), outs, (), loc, "draw", site))
        for t, v in zip(tensors, outs, strict=True):
            self.draw_tensor(t, v)
