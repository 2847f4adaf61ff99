"""What the pictures say about one equation: its cost, and what becomes of its results.

Everything is read from stage regions by liveness over types, so that it holds for any plan: flops by PyTorch's own
formulas (``torch.utils.flop_counter``), bytes of results, and a fate - a result, kept for the backward stage,
handed to the next trip, alive at the peak, freed after its last use, or computed again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload

from mlc.ir.core import Alias, Custom, Eqn, Feed, Index, Loop, Pack, Region, SafeSqrt, Stop, Var
from mlc.ir.keys import equation_key
from mlc.ir.origin import Origin
from mlc.ir.types import TensorType, nbytes
from mlc.passes.cost.equations import flops
from mlc.passes.cost.memory import liveness, root_of

__all__ = [
    "FATES", "Fact", "Fate", "Stage", "any_number", "facts_of", "flops_of", "op_name", "stages_of", "traffic_of",
    "work",
]  # fmt: skip

FATES = ("freed", "kept", "saved", "result", "recomputed", "view")


@dataclass(frozen=True)
class Fate:
    """What becomes of the results of an equation; ``kind`` is one of :data:`FATES`, ``text`` says more."""

    kind: str
    text: str


@dataclass(frozen=True)
class Fact:
    """Cost and fate of one equation.

    Attributes:
        flops: Floating-point operations of one execution, by PyTorch's formulas (0 where there is none).
        bytes: Bytes of new storage that its results take.
        fate: What becomes of the results.
    """

    flops: int
    bytes: int
    fate: Fate


@dataclass(frozen=True)
class Stage:
    """One stage graph of a plan: ``forward`` or ``backward``, with the values it hands to the next."""

    name: str
    region: Region
    saved: frozenset[Var]
    results: frozenset[Var]


def stages_of(stages: Any) -> tuple[Stage, ...]:
    """The stage graphs of a lowered program (:class:`mlc.ir.lowered.stages.Stages`), in the order in which they run."""
    r = stages.forward
    n = stages.n_results
    found = [Stage("forward", r, frozenset(r.outputs[n:]), frozenset(r.outputs[:n]))]
    if stages.backward is not None:
        found.append(Stage("backward", stages.backward, frozenset(), frozenset(stages.backward.outputs)))
    return tuple(found)


# ---- cost


def _shape(v: Var) -> Any:
    return v.type.shape if isinstance(v.type, TensorType) else v


def flops_of(e: Eqn) -> int:
    """Floating-point operations of one execution, by the formulas of ``torch.utils.flop_counter``."""
    return int(flops(e))


def traffic_of(e: Eqn) -> int:
    """Bytes read and written by one execution; 0 for views and what only hands on."""
    if root_of(e) is not None or isinstance(e.op, (Pack, Feed, Custom, Alias, Stop, Loop)):
        return 0
    values = [*dict.fromkeys(e.inputs), *e.outs]
    return sum(nbytes(v.type) for v in values if isinstance(v.type, TensorType))


# ---- fate


def facts_of(stage: Stage) -> dict[Eqn, Fact]:
    """The facts of every equation of a stage, those of loop bodies included."""
    out: dict[Eqn, Fact] = {}
    second = stage.name == "backward"  # what belongs to the forward sweep is done once more there
    _region(stage.region, _ends_of_stage(stage), _twice(stage.region), second, out)
    return out


def _ends_of_stage(stage: Stage) -> dict[Var, Fate]:
    ends = {v: Fate("saved", "kept for the backward stage") for v in stage.saved}
    what = "a result" if stage.name == "forward" else "a hypergradient"
    return ends | {v: Fate("result", what) for v in stage.results}


def _ends_of_body(op: Loop) -> dict[Var, Fate]:
    ends = {v: Fate("saved", "kept from every trip") for v in op.body.outputs[op.n_carry :]}
    return ends | {v: Fate("kept", "handed to the next trip") for v in op.body.outputs[: op.n_carry]}


def _region(r: Region, ends: dict[Var, Fate], twice: set[Eqn], second: bool, out: dict[Eqn, Fact]) -> None:
    last = {v: i for i, e in enumerate(r.eqns) for v in e.inputs}
    peak = liveness(r)[1]
    for i, e in enumerate(r.eqns):
        if isinstance(e.op, Loop):
            if e.op.replay is not None:  # equations that the body has as well are the body's
                again = dict.fromkeys(e.op.replay.body.outputs, Fate("recomputed", "a state rebuilt from a sparse one"))
                _region(e.op.replay.body, again, twice, True, out)
            _region(e.op.body, _ends_of_body(e.op), twice, second, out)
        own = 0 if _shares(e) else sum(nbytes(v.type) for v in e.outs)
        out[e] = Fact(flops_of(e), own, _fate(e, i, last, ends, peak, e in twice, second, r))


def _shares(e: Eqn) -> bool:
    return root_of(e) is not None or isinstance(e.op, (Custom, Feed, Pack))


def _fate(e: Eqn, i: int, last: dict[Var, int], ends: dict[Var, Fate], peak: int, twice: bool, second: bool,
          r: Region) -> Fate:  # fmt: skip
    end = next((ends[v] for v in e.outs if v in ends), None)
    if end is not None:
        return end
    until = max((last.get(v, i) for v in e.outs), default=i)
    line = _words(r.eqns[until], until) if until > i else "at once"
    again = re.fullmatch(r"recomputed(?:\D*(\d+))?", e.tag)
    if again:
        segment = f" in segment {again[1]}" if again[1] else ""
        return Fate("recomputed", f"recomputed{segment}, freed after {line}")
    if second and e.origin in (Origin.FORWARD, Origin.UPDATE) and not _shares(e):
        return Fate("recomputed", f"computed again from what was kept, freed after {line}")
    if _shares(e):
        return Fate("view", "shares the memory of what it reads")
    if i < peak < until:
        return Fate("kept", f"kept over the peak, freed after {line}")
    return Fate("freed", f"freed after {line}" + (", computed again later" if twice else ""))


def _words(e: Eqn, i: int) -> str:
    return f"#{i} {op_name(e)}"


def any_number(of: str, seen: int | None) -> str:
    """``any number of steps (5 seen)``."""
    return f"any number of {of}" + (f" ({seen} seen)" if seen is not None else "")


def op_name(e: Eqn) -> str:
    """``mm`` for ``aten.mm.default``; a primitive by its name."""
    if isinstance(e.op, OpOverload):
        return e.op._schema.name.split("::")[-1].strip("_")
    return e.op.title if isinstance(e.op, Custom) else e.op.name


def _twice(r: Region) -> set[Eqn]:
    """Equations that a recomputed one repeats: the same operator on the same values, by value numbering."""
    number: dict[Var, object] = {}
    first: dict[object, Eqn] = {}
    found: set[Eqn] = set()
    for e in r.eqns:
        if isinstance(e.op, Loop):
            found |= _twice(e.op.body)
        key = _key(e, number)
        for k, v in enumerate(e.outs):
            number[v] = id(v) if key is None else hash((key, k))
        if key is None:
            continue
        before = first.setdefault(key, e)
        if before is not e and e.origin is Origin.RECOMPUTED:
            found.add(before)
    return found


def _key(e: Eqn, number: dict[Var, object]) -> object:
    if e.impure or not isinstance(e.op, (OpOverload, Alias, Stop, SafeSqrt, Index)):
        return None
    return hash(equation_key(e, lambda v: ("value", number.get(v, id(v)))))


def work(e: Eqn, flops: int) -> float:
    """A roofline's estimate of an equation's time, in flops: 8 flops for each byte moved, or its own if more."""
    return float(max(flops, 8 * traffic_of(e)))
