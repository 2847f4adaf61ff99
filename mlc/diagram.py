"""What a drawing of a program shows, in any format: nested boxes for levels, typed arrows between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlc.ir.program import Flow, Level, Program
from mlc.passes.explain import names_text

__all__ = ["Arrow", "Box", "Diagram", "diagram_of"]


@dataclass(eq=False)
class Box:
    """A level, or meta-parameters that flow alike.

    Attributes:
        key: Identifier, letters and digits.
        title: First line.
        lines: What it says below.
        meta: Whether it stands for meta-parameters.
        inside: Boxes of what is nested in it.
    """

    key: str
    title: str
    lines: list[str]
    meta: bool = False
    inside: list[Box] = field(default_factory=list)


@dataclass(frozen=True)
class Arrow:
    """A flow between two boxes; ``dashed`` when no derivative goes along it."""

    source: str
    target: str
    kind: str
    label: str
    dashed: bool


@dataclass
class Diagram:
    """A title, the box of the outermost level, arrows."""

    title: str
    top: Box
    arrows: list[Arrow]


def diagram_of(program: Program) -> Diagram:
    """The diagram of a program's level graph."""
    boxes = {x.name: Box(x.name, _title(x), _lines(x)) for x in program.levels}
    above = {f.target: f.source for f in program.flows if f.why == "trained above"}
    top = boxes[program.levels[0].name]
    metas = _metas(program)
    keys: dict[str, str] = {}
    for i, names in enumerate(metas):
        box = Box(
            f"m{i}",
            names_text(names, 3),
            [f"{len(names)} meta-parameters" if len(names) > 1 else "meta-parameter"],
        )
        box.meta = True
        top.inside.append(box)
        keys.update((n, box.key) for n in names)
    for x in program.levels[1:]:
        boxes[above.get(x.name, top.key)].inside.append(boxes[x.name])
    arrows: dict[Arrow, None] = {}
    for f in program.flows:
        arrows[_arrow(f, keys.get(f.source, f.source))] = None
    return Diagram(program.name, top, list(arrows))


def _title(x: Level) -> str:
    if not x.depth:
        return f"{x.name}: the result"
    trips = "any number of steps" if x.trips is None else f"{x.trips} step" + ("s" if x.trips != 1 else "")
    return f"{x.name}: {x.optimizer}, {trips}"


def _lines(x: Level) -> list[str]:
    if not x.depth:
        return []
    out = [f"trains {names_text(x.trains, 2)}"]
    if x.state:
        out.append(f"carries {x.state} state value" + ("s" if x.state != 1 else ""))
    return out


def _metas(program: Program) -> list[list[str]]:
    """Meta-parameters, those with the same flows together."""
    found: dict[tuple[object, ...], list[str]] = {}
    for i in program.metas:
        name = program.inputs[i].name
        key = tuple((f.kind, f.target, f.carries, f.why, str(f.loc)) for f in program.flows if f.source == name)
        found.setdefault(key, []).append(name)
    return list(found.values())


def _arrow(f: Flow, source: str) -> Arrow:
    label = f.kind
    if f.kind == "value" and f.why and f.why != "trained above":
        label = f"value, {f.why}"
    elif f.kind == "stop" and f.loc is not None:
        label = f"stop, line {f.loc.line}"
    return Arrow(source, f.target, f.kind, label, not f.carries)
