"""Lowering through Inductor: segments of a region run compiled, the rest in the interpreter between them.

A segment is compiled once, however often its structure occurs: in a loop body, its product, the stages, other programs
of the process.  It is trusted only after trials: it runs beside the interpreter on the real values until these are
something else than zeros, and what it gives must agree (:mod:`mlc.runtime.inductor.trial`).  A segment that fails to
compile or to agree stays with the interpreter, with one warning for the program.  Compiled segments read memory
as their types say, so an argument that lies otherwise is copied into place first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.errors import LoweringWarning
from mlc.ir.core import Eqn, Region
from mlc.ir.types import TensorType
from mlc.runtime.inductor.artefacts import Boxed, build
from mlc.runtime.inductor.segments import Fused, fuse, key_of
from mlc.runtime.inductor.trial import difference, exercised
from mlc.runtime.inductor.workers import compile_ahead
from mlc.runtime.interpreter.interpreter import Executable, compile_region
from mlc.runtime.interpreter.recording import current, made, unseen

__all__ = ["Inductor", "Kernel"]

TRIALS = 16  # runs after which values that are always zero count as seen


class Kernel:
    """One distinct segment: compiled before it first runs, on trial until it has shown that it is right.

    Attributes:
        key: What it computes, as text.
        state: ``"new"``, ``"trial"``, ``"trusted"`` or ``"refused"``.
        reason: Why it was refused.
    """

    def __init__(self, key: str, body: Region) -> None:
        self.key = key
        self.body = body
        self.state = "new"
        self.reason = ""
        self.trials = 0
        self._compiled: Boxed | None = None
        self._plain: Executable | None = None
        self._layout = [v.type.stride for v in body.inputs if isinstance(v.type, TensorType)]

    @property
    def plain(self) -> Executable:
        """The segment in the interpreter."""
        if self._plain is None:
            self._plain = compile_region(self.body, lambda e: None)
        return self._plain

    def __call__(self, args: list[Any]) -> Sequence[Tensor]:
        """Run it; ``args`` is emptied, so that what dies inside is freed inside."""
        if self.state == "trusted":
            return made(self._run(args))
        if self.state == "refused":
            return self.plain(args)
        return self._try(args)

    def prepare(self) -> None:
        """Compile it, or find it on disk."""
        try:
            self._compiled = build(self.key, self.body)
            self.state = "trial"
        except Exception as e:
            self.state, self.reason = "refused", f"{type(e).__name__}: {_first_line(e)}"

    def _run(self, args: list[Any]) -> Sequence[Tensor]:
        for i, stride in enumerate(self._layout):
            if args[i].stride() != stride:
                args[i] = _laid(args[i], stride)
        assert self._compiled is not None
        if current() is None:
            return self._compiled(args)
        with unseen():  # what it allocates inside goes by the meter; what comes out is counted by `made`
            return self._compiled(args)

    def _try(self, args: list[Any]) -> Sequence[Tensor]:
        """Beside the interpreter, whose results count."""
        mine = list(args)
        args.clear()
        expected = self.plain(list(mine))
        try:
            got = list(self._run(list(mine)))
        except Exception as e:
            self._refuse(f"does not run: {type(e).__name__}: {_first_line(e)}")
            return expected
        wrong = difference(self.body, mine, expected, got)
        if wrong is not None:
            self._refuse(f"differs from the interpreter: {wrong}")
            return expected
        self.trials += 1
        if self.trials >= TRIALS or exercised(mine, expected):
            self.state = "trusted"
            self._plain = None
        return expected

    def _refuse(self, reason: str) -> None:
        self.state, self.reason, self._compiled = "refused", reason, None
        _warn(f"a compiled segment of {len(self.body)} operators {reason}; ")


def _warn(what: str) -> None:
    """Once per cause; the results are those of the interpreter."""
    advice = 'use backend="interpreter", or check that a C++ compiler works, to avoid this'
    warnings.warn(
        LoweringWarning(f"{what}the interpreter runs instead. Results are right. Try: {advice}"), stacklevel=3
    )


def _laid(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    y = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device)
    return y.copy_(x)


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [""])[0][:200]


_KERNELS: dict[str, Kernel] = {}


class Inductor:
    """Lowers regions: the ``compile`` of :func:`mlc.runtime.interpreter.loop.link`.

    Attributes:
        kernels: The distinct segments of the regions lowered so far.
    """

    def __init__(self) -> None:
        self.kernels: dict[str, Kernel] = {}
        self._unprepared: list[Kernel] = []

    def __call__(self, region: Region, special: Callable[[Eqn], Callable[..., Any] | None]) -> Executable:
        """Executable form of a region; compiles nothing yet."""

        def with_kernels(e: Eqn) -> Callable[..., Any] | None:
            return self.kernel(e.op.body) if isinstance(e.op, Fused) else special(e)

        inner = compile_region(fuse(region), with_kernels)

        def run(args: list[Any]) -> list[Any]:
            if self._unprepared:
                with unseen():
                    self._prepare()
            return inner(args)

        return run

    @property
    def settled(self) -> bool:
        """Whether every segment is trusted or refused."""
        return all(k.state in ("trusted", "refused") for k in self.kernels.values())

    def _prepare(self) -> None:
        """Compile every segment, once all regions of the program are known."""
        new = [k for k in self._unprepared if k.state == "new"]
        self._unprepared.clear()
        compile_ahead([(k.key, k.body) for k in new])
        for k in new:
            k.prepare()
        failed = [k for k in new if k.state == "refused"]
        if failed:
            _warn(f"{len(failed)} of {len(new)} segments do not compile ({failed[0].reason}); ")

    def kernel(self, body: Region) -> Kernel:
        """The kernel of a segment, shared by all that have the same structure."""
        key = key_of(body)
        found = _KERNELS.get(key)
        if found is None:
            found = _KERNELS[key] = Kernel(key, body)
        if key not in self.kernels:
            self.kernels[key] = found
            self._unprepared.append(found)
        return found
