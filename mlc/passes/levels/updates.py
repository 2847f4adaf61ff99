"""Updates whose derivative is not what a reader expects: steps by the sign of a gradient, and steps in low precision.

signSGD, Lion and Rprop step by signs. A sign is flat almost everywhere, so whatever enters the gradient (weights of
samples, a penalty, the start of an earlier step) has the derivative zero behind it, while what the update itself reads
(learning rate, weight decay, the parameter before the step) goes on. That is the derivative of the value, and is given
as it is; a user who waits for weights of samples to learn is told. Muon orthogonalises in bfloat16, whatever the
parameters are: the value is the loop's own, the derivative is that of the formula, with bfloat16's rounding in it.

Both are found in the update of a step (:mod:`mlc.ir.levels.steps`), in O(edges).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from mlc.errors import MlcWarning, PrecisionWarning, SignWarning
from mlc.ir.core import Eqn, Var, aten
from mlc.ir.levels.steps import Step, find_steps
from mlc.ir.levels.valuegraph import ValueGraph
from mlc.ir.origin import Origin
from mlc.ir.program import Program
from mlc.ir.types import TensorType

__all__ = ["told_of_updates"]

_SIGNS = {aten("sign"), aten("sgn")}
_HALF = (torch.bfloat16, torch.float16)


def told_of_updates(program: Program) -> tuple[MlcWarning, ...]:
    """What the user is warned of: one warning of signs, one of low precision, where there are any."""
    every = list(program.region.walk())
    signs = [e for e in every if e.op in _SIGNS]
    casts = [e for e in every if _narrows(e)]
    if not signs and not casts:
        return ()
    graph = ValueGraph(program.region)
    steps = find_steps(graph)
    moved = _moved(graph, steps)
    half = {v for s in steps if any(_half(x) for x, *_ in s.trained) for v in s.zone}
    zone = {v for s in steps for v in s.zone}
    live = _live(program, graph)

    def matters(e: Eqn) -> bool:
        v = e.outs[0]
        return v in live and (v in zone or (e.origin is Origin.UPDATE and e.args[0] in moved))

    found = _signs(program, graph, [e for e in signs if matters(e)])
    rounded = [e for e in casts if matters(e) and e.outs[0] not in half]
    if rounded:
        said = (
            f"the update at {_places(rounded)} computes in {_dtypes(rounded)}: its value is the loop's own, but the"
            " gradient that goes through it has that rounding in it, which may be several percent. Try: an update in"
            " the parameters' dtype (docs/optimizers.md has one for Muon)"
        )
        found.append(PrecisionWarning(said))
    return tuple(found)


def _signs(program: Program, graph: ValueGraph, signs: Sequence[Eqn]) -> list[MlcWarning]:
    """One warning of all live signs."""
    if not signs:
        return []
    names = [program.inputs[i].name for i in program.metas]
    marks = {program.region.inputs[i]: 1 << k for k, i in enumerate(program.metas)}
    full = graph.spread(marks, free=True)
    past = graph.spread(marks, free=True, walls=[e.outs[0] for e in signs])
    results = program.region.outputs[: program.n_outputs]
    goes = _union(past.get(v, 0) for v in results)
    enters = _union(full.get(e.args[0], 0) for e in signs)
    zero = [n for k, n in enumerate(names) if enters & ~goes & _union(full.get(v, 0) for v in results) & 1 << k]
    left = [n for k, n in enumerate(names) if goes & 1 << k]
    if not enters:
        return []
    said = (
        f"the update at {_places(signs)} steps by the sign of its gradient, and the derivative of a sign is zero almost"
        " everywhere: nothing goes back through it to the gradient."
    )
    said += f" The gradient of {_listed(zero)} is zero." if zero else ""
    ways = "what the update itself reads (learning rate, weight decay, the parameter before the step)"
    said += f" What is left goes through {ways}" + (f": that of {_listed(left)}" if left else "")
    return [SignWarning(said)]


def _moved(graph: ValueGraph, steps: Sequence[Step]) -> set[Var]:
    """Values made of a gradient, up to what its step trains."""
    after = [x[1] for s in steps for x in s.trained]
    gradients = {v: 1 for s in graph.grads for v in s.eqn.outs}
    return set(graph.spread(gradients, without=("back", "grad"), walls=after))


def _live(program: Program, graph: ValueGraph) -> set[Var]:
    """Values with a derivative on the way to what the function returns."""
    results = program.region.outputs[: program.n_outputs]
    return set(graph.spread(dict.fromkeys(results, 1), free=True, backward=True))


def _narrows(e: Eqn) -> bool:
    """Whether an equation rounds to 16 bits what had more."""
    return e.op is aten("_to_copy") and bool(e.inputs) and _half(e.outs[0]) and not _half(e.inputs[0])


def _half(v: Var) -> bool:
    return isinstance(v.type, TensorType) and v.type.dtype in _HALF


def _dtypes(eqns: Iterable[Eqn]) -> str:
    names = [str(e.outs[0].type.dtype) for e in eqns if isinstance(e.outs[0].type, TensorType)]
    return " and ".join(dict.fromkeys(n.removeprefix("torch.") for n in names))


def _places(eqns: Iterable[Eqn]) -> str:
    places = list(dict.fromkeys(str(e.loc) for e in eqns))
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more places" if len(places) > 3 else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _union(masks: Iterable[int]) -> int:
    out = 0
    for m in masks:
        out |= m
    return out
