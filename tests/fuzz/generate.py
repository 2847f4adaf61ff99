"""Specs from seeds, and source from specs.

A spec is drawn axis by axis, each choice among those that still fit, so that every seed gives a program that plain
PyTorch runs. `valid` decides for whole specs, also for those that a shrinker makes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import chain

from tests.fuzz import watching  # noqa: F401  registers its extras
from tests.fuzz.data import DATA
from tests.fuzz.draft import Draft
from tests.fuzz.extras import EXTRAS
from tests.fuzz.loops import LOOPS, runs_over
from tests.fuzz.losses import LOSSES, TARGETS, target
from tests.fuzz.metas import METAS, floats
from tests.fuzz.models import ACTS, MODELS, SMOOTH
from tests.fuzz.piece import Axis, Piece
from tests.fuzz.spec import Spec
from tests.fuzz.updates import UPDATES

TRIES = 50  # of a choice that fits; more than half of them do
SINGLE: dict[str, Axis] = {"model": MODELS, "loss": LOSSES, "data": DATA, "loop": LOOPS, "update": UPDATES}


def pieces(spec: Spec) -> list[Piece]:
    """All choices of a spec, in the order in which they are written."""
    single = [axis[getattr(spec, name)] for name, axis in SINGLE.items() if name != "update"]
    return [*single, *(METAS[m] for m in spec.metas), UPDATES[spec.update], *(EXTRAS[e] for e in spec.extras)]


def traits(spec: Spec) -> set[str]:
    """What is true of any piece of a spec."""
    return set(chain.from_iterable(piece.traits for piece in pieces(spec)))


def valid(spec: Spec) -> bool:
    """Whether the choices go together."""
    found = pieces(spec)
    taken = [place for piece in found for place in piece.takes]
    if len(taken) != len(set(taken)) or not spec.metas or not runs_over(spec.loop, DATA[spec.data].traits):
        return False
    alone = spec.batch < 2 and "mixes" in MODELS[spec.model].traits
    return not alone and all(piece.fits(spec) for piece in found)


def pick(rng: random.Random, axis: Axis, names: Iterable[str] | None = None) -> str:
    """One choice, by weight."""
    among = list(axis if names is None else names)
    return rng.choices(among, [axis[name].weight for name in among])[0]


def several(rng: random.Random, spec: Spec, axis: Axis, number: int) -> Spec:
    """Up to `number` choices more; one that does not fit is drawn again."""
    field = axis.name
    for _ in range(number):
        old = getattr(spec, field)
        for _ in range(TRIES):
            more = pick(rng, axis)
            longer = spec.but(**{field: (*old, more)})
            if more not in old and valid(longer):
                spec = longer
                break
    return spec


def spec_of(seed: int) -> Spec:
    """The program of a seed."""
    rng = random.Random(seed)
    model, update = pick(rng, MODELS), pick(rng, UPDATES)
    data = pick(rng, DATA)
    loops = [name for name in LOOPS if runs_over(name, DATA[data].traits)]
    spec = Spec(
        seed,
        model=model,
        act=rng.choice(SMOOTH if rng.random() < 0.7 else ACTS),
        loss=pick(rng, LOSSES),
        data=data,
        loop=pick(rng, LOOPS, loops),
        update=update,
        place=rng.choice(("inside", "inside", "outside")),
        metas=(),
        result=rng.choice(("scalar", "scalar", "tuple", "dict")),
        end=rng.choice(("train", "train", "eval")),
        steps=rng.choice((1, 2, 2, 3, 3)),
        batch=rng.choice((2, 3, 4)),
    )
    if "act" not in MODELS[model].traits:
        spec = spec.but(act="Tanh")
    spec = spec if UPDATES[update].fits(spec) else spec.but(update="sgd")
    spec = spec if DATA[data].fits(spec) else spec.but(steps=2)
    spec = spec if LOOPS[spec.loop].fits(spec) else spec.but(loop="for_")
    spec = several(rng, spec, METAS, rng.choice((1, 1, 2, 3)))
    return several(rng, spec, EXTRAS, rng.choice((0, 1, 1, 2, 2, 3)))


def draft_of(spec: Spec) -> Draft:
    """All pieces, written."""
    d = Draft(spec, filled=frozenset(place for piece in pieces(spec) for place in piece.takes))
    d.setup.append("net = model")
    d.args |= {"model": "model", "meta": "meta", "val": "val"}
    MODELS[spec.model].write(d)
    total = spec.batch * spec.steps
    examples = "torch.randint(7, {})" if not floats(spec) else "torch.randn({})"
    kind = TARGETS[target(spec.loss)]
    d.make += [
        f"xs, ys = {examples.format((total, *d.shape))}, {kind.format(n=total)}",
        f"ns = torch.arange({total})",
        f"val = {examples.format((5, *d.shape))}, {kind.format(n=5)}",
        *(["xs, val = xs + near * xs.sin(), (val[0] + near * val[0].sin(), val[1])"] if floats(spec) else []),
        "meta = {}",
    ]
    for piece in pieces(spec)[1:]:
        piece.write(d)
    if spec.identity:
        d.pre += ["x = x * 1"]
        d.outs += ["out = out.view_as(out)"]
        d.terms += ["loss = loss.clone() * 1.0"]
    if spec.end == "eval":
        d.after.append("net.eval()")
    return d


def source_of(spec: Spec) -> str:
    """The file of a spec."""
    return draft_of(spec).source()
