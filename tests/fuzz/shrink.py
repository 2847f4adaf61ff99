"""The smallest program that still fails in the same way.

Greedy: of all specs that are one choice simpler, the first whose verdict has the same signature is taken, until none
has (delta debugging, Zeller and Hildebrandt 2002, over choices instead of lines). Every try is a judgement: seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.fuzz.generate import valid
from tests.fuzz.judge import judged
from tests.fuzz.spec import AXES, Spec
from tests.fuzz.verdict import Verdict

SIMPLE: dict[str, tuple[str, ...]] = {
    "model": ("linear", "mlp", "batchnorm_plain", "dropout", "half_frozen"),
    "act": ("Tanh",),
    "loss": ("cross_entropy", "mse", "kl"),
    "data": ("tuples", "loader", "sliced"),
    "loop": ("for_", "steps", "epochs"),
    "update": ("sgd", "sgd_momentum", "adam", "hand_minus", "fast"),
    "place": ("inside",),
    "result": ("scalar",),
    "end": ("train",),
}


def simpler(spec: Spec) -> Iterator[Spec]:
    """Valid specs that are one choice simpler, the largest simplifications first."""
    for field in ("extras", "metas"):
        for name in getattr(spec, field):
            rest = tuple(x for x in getattr(spec, field) if x != name)
            yield spec.but(**{field: rest})
    for meta in ("ridge", "bias"):
        if spec.metas not in (("ridge",), ("bias",)):
            yield spec.but(metas=(meta,))
    for data, loop in (("tuples", "for_"), ("loader", "for_"), ("sliced", "steps")):
        if (spec.data, spec.loop) != ("tuples", "for_"):
            yield spec.but(data=data, loop=loop)
    for axis in AXES:
        now = getattr(spec, axis)
        better = SIMPLE[axis][: SIMPLE[axis].index(now)] if now in SIMPLE[axis] else SIMPLE[axis]
        for choice in better:
            yield spec.but(**{axis: choice})
    if spec.steps > 1:
        yield spec.but(steps=spec.steps - 1)
    if spec.batch > 2:
        yield spec.but(batch=2)


def shrunk(
    spec: Spec, verdict: Verdict, *, depth: int = 0, tries: int = 80, judge: Callable[..., Verdict] = judged
) -> tuple[Spec, Verdict]:
    """The smallest spec found with the signature of a verdict, and its own verdict."""
    seen = {spec.dump()}
    while True:
        for smaller in simpler(spec):
            if smaller.dump() in seen or not valid(smaller):
                continue
            seen.add(smaller.dump())
            tries -= 1
            found = judge(smaller, depth=depth)
            if found.signature == verdict.signature:
                spec, verdict = smaller, found
                break
            if tries <= 0:
                return spec, verdict
        else:
            return spec, verdict
