"""What a drawing of a program shows, in any format: levels as nested boxes, in each what it trains and its loss.

Arrows are the flows, between the rows that they are about: a meta-parameter enters a loss, a loss trains
parameters, trained parameters enter a loss above.  With a plan they say how their derivative is taken and what
that costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mlc.ir.core import Loop, Region
from mlc.ir.program import Flow, Level, Program
from mlc.ir.types import SeqType, Type
from mlc.passes.cost.facts import any_number
from mlc.units import size_text, time_text
from mlc.view.explain import choice_of
from mlc.view.tables import names_text

if TYPE_CHECKING:
    from mlc.view.plan import Plan

__all__ = ["MANY", "Arrow", "Box", "Diagram", "diagram_of"]

MANY = 12  # levels from which on a picture leaves some out
_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


@dataclass(eq=False)
class Box:
    """A level, or a row in one: meta-parameters that flow alike, what is trained, the loss.

    Attributes:
        key: Identifier, letters and digits.
        kind: ``level``, ``meta``, ``params``, ``loss``, or ``more`` for levels that are left out.
        title: What it is.
        note: What else is known, in smaller print.
        inside: Rows and levels nested in it, top-down.
    """

    key: str
    kind: str
    title: str
    note: str = ""
    inside: list[Box] = field(default_factory=list)

    def all(self) -> list[Box]:
        """It and everything inside, top-down."""
        return [self, *[x for b in self.inside for x in b.all()]]


@dataclass(frozen=True)
class Arrow:
    """A flow between two rows; ``dashed`` when no derivative goes along it; ``detail`` tells why."""

    source: str
    target: str
    kind: str
    label: str
    dashed: bool
    detail: str = ""


@dataclass
class Diagram:
    """A title, the box of the outermost level, arrows, and what the plan says of the whole."""

    title: str
    top: Box
    arrows: list[Arrow]
    note: str = ""


def diagram_of(program: Program, plan: Plan | None = None, most: int = MANY) -> Diagram:
    """The diagram of a program's level graph.

    Args:
        program: The program.
        plan: Its plan, for what was chosen on each flow.
        most: Levels shown at most; those nested deepest are left out first.
    """
    types = {x.name: x.type for x in program.inputs}
    boxes = {x.name: _level(x, types, _seen(program.region, x)) for x in program.levels}
    top = boxes[program.levels[0].name]
    above = {f.target: f.source for f in program.flows if f.why == "trained above"}
    metas = [Box(f"m{i}", "meta", names_text(names, 2), _size(names, types)) for i, names in enumerate(_metas(program))]
    top.inside[:0] = metas
    for x in program.levels[1:]:
        boxes[above.get(x.name, top.key)].inside.append(boxes[x.name])
    ends = {n: b.key for names, b in zip(_metas(program), metas, strict=True) for n in names}
    cut = {(f.source, f.target) for f in program.flows if f.kind == "stop"}
    shown = [f for f in program.flows if f.kind == "stop" or f.carries or (f.source, f.target) not in cut]
    arrows = dict.fromkeys(_arrow(f, ends, plan) for f in shown)  # a stop says why nothing flows beside it
    return _collapsed(Diagram(program.name, top, list(arrows), _summary(plan)), most)


def _summary(plan: Plan | None) -> str:
    if plan is None:
        return ""
    peak = f"predicted peak {size_text(plan.peak_bytes)}" if plan.peak_bytes else ""
    budget = f"budget {size_text(plan.memory)}" if plan.memory is not None else ""
    time = f"predicted {time_text(plan.seconds)}" if plan.seconds else ""
    return " · ".join(t for t in (time, peak, budget) if t)


def _level(x: Level, types: dict[str, Type], seen: int | None) -> Box:
    line = f"line {x.loc.line}" if x.loc is not None else ""
    if not x.depth:
        return Box(
            x.name,
            "level",
            x.name,
            f"the function, {line}" if line else "the function",
            [Box(f"{x.name}_loss", "loss", "result")],
        )
    steps = any_number("steps", seen) if x.trips is None else f"{x.trips} step" + ("s" if x.trips != 1 else "")
    carries = f"carries {x.state} state value{'s' if x.state != 1 else ''}" if x.state else ""
    rows = [
        Box(f"{x.name}_params", "params", names_text(x.trains, 2), _size([n.rstrip("'") for n in x.trains], types)),
        Box(f"{x.name}_loss", "loss", "loss", line),
    ]
    return Box(x.name, "level", x.name, " · ".join(t for t in (x.optimizer, steps, carries) if t), rows)


def _seen(region: Region, x: Level) -> int | None:
    """How many steps of a level the traced call had, where any number may run."""
    seen = None
    for at in x.at[-1][:-1] if x.at else ():
        op = region.eqns[at].op
        if not isinstance(op, Loop):
            break
        seen, region = op.usual, op.body
    return seen


def _size(names: list[str], types: dict[str, Type]) -> str:
    """``f32[8,4]``, or for several values their number of elements: ``f32[11.2M]``."""
    found = [t for n in names if (t := types.get(n)) is not None]
    if not found:
        return ""
    dtypes = {_elem(t) for t in found}
    count = sum(_count(t) for t in found)
    shape = _numbers(found[0]) if len(found) == 1 else _short(count)
    return f"{dtypes.pop() if len(dtypes) == 1 else ''}[{shape}]"


def _elem(t: Type) -> str:
    while isinstance(t, SeqType):
        t = t.elem
    name = str(t.dtype).removeprefix("torch.")
    word = name.rstrip("0123456789")
    return _SHORT.get(word, word) + name[len(word) :]


def _count(t: Type) -> int:
    return _count(t.elem) * (t.length or 1) if isinstance(t, SeqType) else t.numel


def _numbers(t: Type) -> str:
    return _numbers(t.elem) if isinstance(t, SeqType) else ",".join(map(str, t.shape))


def _short(n: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def _metas(program: Program) -> list[list[str]]:
    """Meta-parameters, those with the same flows together."""
    found: dict[tuple[object, ...], list[str]] = {}
    for i in program.metas:
        name = program.inputs[i].name
        key = tuple((f.kind, f.target, f.carries, f.why, str(f.loc)) for f in program.flows if f.source == name)
        found.setdefault(key, []).append(name)
    return list(found.values())


# ---- arrows


def _arrow(f: Flow, metas: dict[str, str], plan: Plan | None) -> Arrow:
    source = metas.get(f.source) or f"{f.source}_{'loss' if f.kind == 'gradient' else 'params'}"
    into = "params" if f.kind == "gradient" or f.why in ("update", "start") else "loss"
    label, detail = f.kind, f.why
    if f.kind == "stop":
        where = f", line {f.loc.line}" if f.loc is not None else ""
        return Arrow(source, f"{f.target}_{into}", f.kind, f"stop: {f.why}{where}", True, f.why)
    if f.kind == "value":
        label = "value" if f.why in ("loss", "trained above") else f"value, {f.why}"
    if plan is not None:
        choice, detail, cost = choice_of(plan, f)
        label = " · ".join(t for t in (label, choice, cost) if t)
    return Arrow(source, f"{f.target}_{into}", f.kind, label, not f.carries, detail)


# ---- many levels


def _collapsed(d: Diagram, most: int) -> Diagram:
    """With at most ``most`` levels: those nested deepest, and the last, become one box that counts them."""
    shown = [b for b in d.top.all() if b.kind == "level"]
    depth = _depths(d.top)
    kept = set(sorted(range(len(shown)), key=lambda i: (depth[shown[i].key], i))[:most])
    hidden = {b.key for i, b in enumerate(shown) if i not in kept}
    if not hidden:
        return d
    becomes: dict[str, str] = {}
    _hide(d.top, hidden, becomes)
    arrows: dict[Arrow, None] = {}
    for a in d.arrows:
        new = replace(a, source=becomes.get(a.source, a.source), target=becomes.get(a.target, a.target))
        if new.source != new.target or a.source == a.target:
            arrows[new if new.source == a.source and new.target == a.target else replace(new, label=a.kind)] = None
    return Diagram(d.title, d.top, list(arrows), d.note)


def _depths(box: Box, depth: int = 0) -> dict[str, int]:
    out = {box.key: depth}
    for b in box.inside:
        out |= _depths(b, depth + 1)
    return out


def _hide(box: Box, hidden: set[str], becomes: dict[str, str]) -> None:
    gone = [b for b in box.inside if b.key in hidden]
    box.inside = [b for b in box.inside if b.key not in hidden]
    for b in box.inside:
        _hide(b, hidden, becomes)
    if not gone:
        return
    levels = [x for b in gone for x in b.all() if x.kind == "level"]
    title = f"{len(levels)} more level{'s' if len(levels) > 1 else ''}"
    more = Box(f"{box.key}_more", "more", title, names_text([x.title for x in levels], 3))
    box.inside.append(more)
    becomes.update((x.key, more.key) for b in gone for x in b.all())
