"""Formulas for people: rounded coefficients in readable units, one line, and where another choice wins."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from mlc.passes.formulas.comparison import Formulas
from mlc.passes.formulas.formulas import Replayed
from mlc.passes.formulas.peaks import Expr

__all__ = ["expression_text", "formula_line", "formula_lines"]

_TIMES = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
_SIZES = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("bytes", 1.0))


def formula_line(f: Formulas) -> str:
    """``time ~ 0.137 + 1.03 T ms, peak ~ 14.7 + 25.4 T KiB (T: trips of L1, now 20)``; empty without a symbol."""
    if not f.symbols:
        return ""
    time = expression_text(f.seconds, f.now, _TIMES)
    peak = "no formula" if f.peak_bytes is None else expression_text(f.peak_bytes, f.now, _SIZES)
    legend = "; ".join(f"{s}: {meaning}, now {f.now[s]}" for s, meaning in f.symbols.items())
    return f"time ~ {time}, peak ~ {peak} ({legend})"


def formula_lines(f: Formulas, verbose: bool) -> list[str]:
    """The formulas of a plan, from where on they hold; ``verbose``: those of its rivals, and break-even points."""
    if not f.symbols:
        return []
    floors = " and ".join(f"{s} >= {n}" for s, n in f.least.items() if n > 2)
    out = [f"formula: {formula_line(f)}" + (f", for {floors}" if floors else "")]
    if not verbose:
        return out
    out.append(f"arithmetic ~ {expression_text(f.flops, f.now, _COUNTS)}")
    if any(x.has(Replayed) for x in (f.seconds, *(r.seconds for r in f.rivals.values()))):
        out.append("replayed(T, s): steps made again from s sets of states in T trips" + _example(f))
    unknown = [s.name for s in f.symbols if s not in f.least]
    out += [f"the peak is known at the present {s} only" for s in unknown]
    for name, r in f.rivals.items():
        peak = "no formula" if r.peak_bytes is None else expression_text(r.peak_bytes, f.now, _SIZES)
        out.append(f"{name}: time ~ {expression_text(r.seconds, f.now, _TIMES)}, peak ~ {peak}")
    return [*out, *[f"break-even: {b}" for b in f.breaks]]


_COUNTS = (("Tflop", 1e12), ("Gflop", 1e9), ("Mflop", 1e6), ("kflop", 1e3), ("flop", 1.0))


def _example(f: Formulas) -> str:
    found = next((x for e in (f.seconds, *(r.seconds for r in f.rivals.values())) for x in e.atoms(Replayed)), None)
    return "" if found is None else f"; replayed({found.args[0]}, {found.args[1]}) is now {found.subs(f.now)}"


def expression_text(e: Expr, now: Mapping[Expr, int], units: tuple[tuple[str, float], ...]) -> str:
    """An expression with three digits, in the unit that suits its present value."""
    value = abs(float(e.subs(now).subs({s: 1 for s in e.free_symbols})))
    unit, size = next(((u, s) for u, s in units if value >= s), units[-1])
    pieces = _active(e, now) if isinstance(e, sympy.Max) else [e]
    texts = [_sum_text(p, size) for p in pieces]
    return f"{texts[0] if len(texts) == 1 else 'max(' + ', '.join(texts) + ')'} {unit}"


def _active(e: Expr, now: Mapping[Expr, int]) -> list[Expr]:
    """The pieces of a maximum that hold somewhere between half and eight times the present counts."""
    points = [{s: max(2, int(n * k)) for s, n in now.items()} for k in (0.5, 1, 2, 4, 8)]
    return list(dict.fromkeys(max(e.args, key=lambda p: float(p.subs(at))) for at in points))


def _sum_text(e: Expr, size: float) -> str:
    terms = sympy.expand(e).as_coefficients_dict()
    rows = sorted(terms.items(), key=lambda x: (x[0] != 1, len(x[0].free_symbols), x[0].has(Replayed), str(x[0])))
    out = ""
    for what, factor in rows:
        number = f"{abs(float(factor)) / size:.3g}"
        name = str(what).replace("Replayed", "replayed").replace("*", " ")
        sign = (" - " if factor < 0 else " + ") if out else ("-" if factor < 0 else "")
        out += sign + number + ("" if what == 1 else f" {name}")
    return out or "0"
