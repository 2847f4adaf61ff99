"""Plans as data: the decisions of the compiler - what was chosen for each flow, why, what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlc.errors import PlanError
from mlc.ir.lowered.contract import Context, Levers, Modes
from mlc.ir.lowered.decision import Decision
from mlc.ir.lowered.precision import Resolved
from mlc.ir.lowered.responses import read

__all__ = ["VERSION", "Decision", "PlanDocument", "read_plan"]

VERSION = 1


class PlanDocument(BaseModel):
    """What the compiler decided for one program.

    Attributes:
        version: Format version.
        program: Digest of the program that it belongs to.
        memory: The budget asked for, bytes; None without one.
        mode: ``"mixed"`` or ``"reverse"``: how inner gradients are differentiated; ``"forward"``: tangents of the
            meta-parameters go through the loops (see :mod:`mlc.passes.lowering.modes`).
        flows: Modes of single levels' gradients, where they differ from it.
        responses: How the derivative of what a level trained is obtained, by name of the level, where not exactly.
        off: Paths that are switched off, ``"w -> L1 -> L0"``.
        stop: Meaning of stops, ``"all"`` or ``"inner"``.
        backend: ``"interpreter"`` or ``"inductor"``.
        price: Seconds of a call that a byte of its peak was worth (see :class:`mlc.ir.lowered.contract.Levers`).
        slots: Sets of states kept per loop, the others replayed; None: all of them.
        parts: Micro-batches, where examples are independent.
        offload: Bytes of an element from which on what loops keep for their adjoint rests on the host; None: nothing.
        decisions: Every decision with its reason.
        peak_bytes: Predicted peak of what a call allocates beyond its inputs, bytes.
        host_bytes: Predicted bytes that rest on the host beside them.
        seconds: Predicted time of forward and backward, seconds.
        precision: In which dtypes levels and flows compute and store; None: exact.
        passes: Names of the passes, where they are not :data:`mlc.passes.lowering.pipeline.PIPELINE`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    program: str
    memory: int | None = None
    mode: str = "mixed"
    flows: dict[str, str] = Field(default_factory=dict)
    responses: dict[str, dict[str, Any]] = Field(default_factory=dict)
    off: tuple[str, ...] = ()
    stop: str = "all"
    backend: str = "interpreter"
    price: float = Field(default=0.0, ge=0)
    slots: int | None = Field(default=None, ge=1)
    parts: int = Field(default=1, ge=1)
    offload: int | None = Field(default=None, ge=1)
    decisions: tuple[Decision, ...] = ()
    peak_bytes: int = 0
    host_bytes: int = 0
    seconds: float = 0.0
    passes: tuple[str, ...] = ()
    precision: Resolved | None = None

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def levers(self) -> Levers:
        """What is kept and what is computed again."""
        return Levers(self.price, self.slots, self.parts, offload=self.offload)

    @property
    def context(self) -> Context:
        """What the passes are told."""
        return Context(self.modes, self.stop, self.levers, self.precision)

    @property
    def modes(self) -> Modes:
        """Which way derivatives go, and how each level responds."""
        return Modes(self.mode, self.flows, {name: read(x) for name, x in self.responses.items()}, self.off)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n")


def read_plan(path: Path) -> dict[str, Any]:
    """The fields of a plan that was saved.

    Raises:
        PlanError: when the file is malformed, or from a newer version.
    """
    again = "make it again with mlc.plan(program).save(path)"
    try:
        data = json.loads(path.read_text())
    except OSError as e:
        raise PlanError(f"{path}: {e.strerror}", advice=again) from None
    except ValueError as e:
        raise PlanError(f"{path} is no plan: {e}", advice=again) from None
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise PlanError(f"{path} is no plan: it has no version", advice=again)
    if version > VERSION:
        raise PlanError(
            f"{path} has version {version} of the format; this mlc reads up to {VERSION}",
            advice=f"update mlc, or {again}",
        )
    try:
        return PlanDocument.model_validate(data).model_dump()
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise PlanError(f"{path} is no plan: {where}: {first['msg']}", advice=again) from None
