"""The time-memory curve of a program: a table for people, CSV for programs, a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from mlc.errors import MlcError
from mlc.units import size_text, time_text
from mlc.view.plan import Plan
from mlc.view.tables import printed, table

__all__ = ["curve_csv", "curve_picture", "curve_table", "save_curve"]

_COLUMNS = ("seconds", "peak_bytes", "mode", "backend", "price", "slots", "parts", "offload")


def curve_table(plans: Sequence[Plan]) -> str:
    """One line per plan, fastest first: predicted time and peak, and the levers that give them."""
    rows = [
        [time_text(p.seconds), size_text(p.peak_bytes), p.mode, p.backend, _price(p),
         "all" if p.slots is None else str(p.slots), str(p.parts), size_text(p.host_bytes) if p.host_bytes else ""]
        for p in plans
    ]  # fmt: skip
    titles = ("time", "memory", "mode", "lowering", "price of a MiB", "states", "parts", "on the host")
    return printed(table(titles, rows))


def _price(p: Plan) -> str:
    return "nothing" if not p.price else time_text(p.price * 2**20)


def curve_csv(plans: Sequence[Plan]) -> str:
    """The same as CSV: seconds, bytes, and the levers as plans hold them."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([getattr(p, c) for c in _COLUMNS] for p in plans)
    return out.getvalue()


def curve_picture(plans: Sequence[Plan], path: Path) -> None:
    """Peak over time as a picture, by matplotlib.

    Raises:
        MlcError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MlcError(
            "a picture of the curve needs matplotlib", advice="pip install matplotlib, or -o curve.csv"
        ) from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.step([p.peak_bytes / 2**20 for p in plans], [p.seconds for p in plans], "o-", where="post")
    for p in plans:
        label = f"{p.parts} parts" if p.parts > 1 else "all kept" if not p.price else ""
        axes.annotate(label, (p.peak_bytes / 2**20, p.seconds), (5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="predicted peak, MiB", ylabel="predicted seconds of a call", xscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def save_curve(plans: Sequence[Plan], path: Path) -> None:
    """Write the curve: ``.csv``, or ``.svg`` and ``.png`` as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        path.write_text(curve_csv(plans))
    elif path.suffix in (".svg", ".png"):
        curve_picture(plans, path)
    else:
        raise MlcError(f"a curve is no {path.suffix or path.name}", advice="-o curve.csv, curve.svg or curve.png")
