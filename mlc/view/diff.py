"""What changed between two plans, and what that does to time and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlc.units import size_text, time_text
from mlc.view.tables import printed, table

if TYPE_CHECKING:
    from mlc.ir.lowered.decision import Decision
    from mlc.view.plan import Plan

__all__ = ["changes", "compare"]

_TOTALS = ("seconds", "peak_bytes", "host_bytes")
_QUIET = ("version", "program", "decisions", *_TOTALS)  # shown on their own, or no decision


def compare(a: Plan, b: Plan) -> str:
    """The differences for people: totals, settings, then every decision that is not the same."""
    if a == b:
        return "the plans are equal\n"
    parts: list[object] = []
    if a.program != b.program:
        parts.append(f"the plans belong to different programs ({a.program[:12]}, {b.program[:12]})")
    parts.append(table(("total", "before", "after", "change"), _totals(a, b)))
    settings = [[k, _word(getattr(a, k)), _word(getattr(b, k))] for k in changes(a, b)["settings"]]
    if settings:
        parts.append(table(("setting", "before", "after"), settings))
    rows = [_row(s, x, y) for s, x, y in _changed(a, b)]
    if rows:
        parts.append(table(("decision", "before", "after", "time", "memory", "why"), rows))
    return printed(*parts)


def changes(a: Plan, b: Plan) -> dict[str, list[str]]:
    """Names of settings and subjects of decisions that differ."""
    fields = [k for k in type(a).model_fields if k not in _QUIET and getattr(a, k) != getattr(b, k)]
    return {"settings": fields, "decisions": [s for s, _, _ in _changed(a, b)]}


def _changed(a: Plan, b: Plan) -> list[tuple[str, Decision | None, Decision | None]]:
    before, after = ({d.subject: d for d in p.decisions} for p in (a, b))
    subjects = dict.fromkeys([*before, *after])
    return [(s, before.get(s), after.get(s)) for s in subjects if before.get(s) != after.get(s)]


def _totals(a: Plan, b: Plan) -> list[list[str]]:
    rows = []
    for name, title, text in (("seconds", "time", time_text), ("peak_bytes", "peak memory", size_text),
                              ("host_bytes", "on the host", size_text)):  # fmt: skip
        x, y = getattr(a, name), getattr(b, name)
        ratio = f"{(y / x - 1) * 100:+.1f}%" if x else ""
        if x or y:
            rows.append([title, text(x), text(y), ratio if x != y else "the same"])
    return rows


def _row(subject: str, x: Decision | None, y: Decision | None) -> list[str]:
    time = _delta(x.seconds if x else None, y.seconds if y else None, time_text)
    memory = _delta(x.bytes if x else None, y.bytes if y else None, size_text)
    why = y.reason if y else "no longer decided"
    return [subject, x.choice if x else "-", y.choice if y else "-", time, memory, why]


def _delta(x: float | None, y: float | None, text: object) -> str:
    if x is None or y is None or x == y:
        return ""
    assert callable(text)
    return f"{'+' if y > x else '-'}{text(abs(y - x))}"


def _word(value: object) -> str:
    return "-" if value is None else str(value)
