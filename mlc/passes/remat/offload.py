"""Offload: which sequences that loops emit rest on the host until the adjoint reads them, and what the copies cost.

A loop says so by its ``host`` (see :class:`mlc.ir.core.Loop`); no value changes, so the pass comes last.  Copies run
beside the computation (:mod:`mlc.runtime.interpreter.host`): a trip takes the longer of its computing and of the copies
that it asks for, and of every loop one trip's copies stay uncovered.  O(equations).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mlc.ir.core import Eqn, Loop, Region, Var
from mlc.ir.lowered.contract import Context, Graphs
from mlc.ir.lowered.slots import replayed_steps
from mlc.ir.lowered.stages import Stages
from mlc.ir.origin import Origin
from mlc.ir.types import SeqType, TensorType, nbytes
from mlc.passes.cost.equations import Meter
from mlc.passes.cost.memory import rebuilt_of, roots_of

__all__ = ["LEAST", "Offload", "Transfers", "offload", "transfers"]

LEAST = 2**16  # bytes of an element below which starting a copy costs more than the memory is worth


@dataclass(frozen=True)
class Transfers:
    """Copies of a call between the device and the host.

    Attributes:
        bytes: At most on the host at once, bytes.
        seconds: By how much a call is longer than its computing, seconds.
    """

    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Offload:
    """Marks of loops whose emissions rest on the host (``stages -> stages``)."""

    name: ClassVar[str] = "offload"
    takes: ClassVar[type[Stages]] = Stages
    ensures: ClassVar[str] = "no value changes; loops say which of their emissions rest on the host"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        """From as many bytes of an element on as the levers name; nothing where they name none."""
        assert isinstance(graphs, Stages)
        if context.levers.offload is None:
            return graphs
        both = (graphs.forward, *([] if graphs.backward is None else [graphs.backward]))
        found = offload(both, context.levers.offload)
        return replace(graphs, forward=found[0], backward=found[1] if len(found) > 1 else None)


def offload(regions: Iterable[Region], least: int) -> tuple[Region, ...]:
    """The stages, with what their loops emit for later loops on the host.

    Args:
        regions: Stages of one program, in order.
        least: Bytes of an element from which on its sequence is taken; of states kept sparsely, of a set.
    """
    regions = tuple(regions)
    users: dict[Var, list[Eqn]] = {}
    for r in regions:
        _users(r, users)
    return tuple(_marked(r, least, users) for r in regions)


def _users(region: Region, users: dict[Var, list[Eqn]]) -> None:
    for e in region.walk():
        for v in e.inputs:
            users.setdefault(v, []).append(e)


def _marked(region: Region, least: int, users: dict[Var, list[Eqn]]) -> Region:
    eqns = [e.with_(op=_loop(e, e.op, least, users)) if isinstance(e.op, Loop) else e for e in region.eqns]
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


def _loop(e: Eqn, op: Loop, least: int, users: dict[Var, list[Eqn]]) -> Loop:
    body = _marked(op.body, least, users)
    if e.origin is Origin.ADJOINT:
        return replace(op, body=body)
    rebuilt, roots = rebuilt_of(op), roots_of(op.body)
    owned = {*op.body.inputs[: op.n_carry], *(v for x in op.body.eqns for v in x.outs)}
    few = op.replay is not None and op.replay.slots < 2  # the only set is that of the start, which others hold too
    sets = sum(nbytes(v.type) for v in rebuilt)
    host = []
    for j, (out, v) in enumerate(zip(e.outs[op.n_carry :], op.body.outputs[op.n_carry :], strict=True)):
        size = sets * (not few) if v in rebuilt else nbytes(v.type)
        plain = isinstance(v.type, TensorType) and roots.get(v, v) in owned
        if plain and size >= least and all(isinstance(x.op, Loop) for x in users.get(out, ())):
            host.append(j)
    return replace(op, body=body, host=tuple(host))


def transfers(regions: Iterable[Region], meter: Meter) -> Transfers:
    """What the copies of a call are predicted to hold and to cost.

    Args:
        regions: Stages of one program, in order.
        meter: Cost of equations.
    """
    count = _Count(meter)
    found = [count.region(r) for r in regions]
    return Transfers(sum(t.bytes for t in found), sum(t.seconds for t in found))


class _Count:
    """Walks stages; ``resting`` are the sequences on the host met so far, with their bytes."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.resting: dict[Var, int] = {}
        link = meter.rates.host
        self.beside = link is not None
        self.rate = link or meter.rates.far  # without a link, the copies of the same memory, and nothing hides them

    def region(self, region: Region) -> Transfers:
        found = [self._loop(e, e.op) for e in region.eqns if isinstance(e.op, Loop)]
        return Transfers(sum(t.bytes for t in found), sum(t.seconds for t in found))

    def _loop(self, e: Eqn, op: Loop) -> Transfers:
        read = [(a, v) for a, v in zip(e.args, op.body.inputs, strict=True) if a in self.resting]
        self.resting.update((v, self.resting[a] // op.count) for a, v in read if isinstance(v.type, SeqType))
        inner = self.region(op.body)
        handed = {v for v in op.body.outputs[op.n_carry :] if v in self.resting}
        made = self._emitted(e, op)
        moved = _bytes(v for _, v in read if isinstance(v.type, TensorType))
        moved += _bytes(op.body.outputs[op.n_carry + j] for j in self._plain(op))
        seconds = op.count * (inner.seconds + self._uncovered(moved, op.body)) + self.beside * moved / self.rate
        if op.replay is not None:
            again = _bytes(op.body.outputs[op.n_carry + j] for j in op.replay.dense if j in op.host)
            steps = replayed_steps(op.count, op.replay.slots)
            seconds += steps * self._uncovered(again, op.replay.body)
        kept = inner.bytes - sum(self.resting[v] for v in handed)
        return Transfers(made + max(kept, 0), seconds)

    def _plain(self, op: Loop) -> list[int]:
        rebuilt = rebuilt_of(op)
        return [j for j in op.host if op.body.outputs[op.n_carry + j] not in rebuilt]

    def _emitted(self, e: Eqn, op: Loop) -> int:
        """Bytes that the loop's emissions hold on the host, these noted."""
        rebuilt, total = rebuilt_of(op), 0
        for j, (out, v) in enumerate(zip(e.outs[op.n_carry :], op.body.outputs[op.n_carry :], strict=True)):
            if v in self.resting and isinstance(v.type, SeqType):
                size = op.count * self.resting[v]
            elif j not in op.host:
                continue
            elif v in rebuilt:
                assert op.replay is not None
                size = (min(op.replay.slots, op.count) - 1) * nbytes(v.type)
            else:
                size = op.count * nbytes(v.type)
            self.resting[out] = size
            total += size
        return total

    def _uncovered(self, moved: int, body: Region) -> float:
        """Seconds of a trip's copies that its computing does not hide."""
        if not moved:
            return 0.0
        return max(0.0, moved / self.rate - self.beside * self.meter.region(body).seconds)


def _bytes(values: Iterable[Any]) -> int:
    return sum(nbytes(v.type) for v in values)
