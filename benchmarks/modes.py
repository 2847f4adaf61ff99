"""Forward against reverse mode for few hyperparameters, and where they break even.

A small MLP, SGD with momentum; learning rate, weight decay and momentum are learned, and for the break-even the
weights of single training examples too. Every point is measured in processes of its own, after a warm-up:
seconds under ordinary malloc, and in another process the peak, with malloc returning memory at once.

    python benchmarks/modes.py [--quick] [--steps 50 200] [--counts 1 2 4 8 16 32] [--calls 3] [--out FILE]
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from _results import HERE, RESULTS, busy, run_point, write
from rich.console import Console
from rich.table import Table

MEGABYTE = 1e6
MODES = ("mixed", "forward")
FEW = 3
Point = dict[str, Any]


def measure(mode: str, steps: int, count: int, calls: int, quick: bool) -> Point:
    """One point; memory in a process of its own, unless nobody will look at the seconds."""
    size = "SMALL" if quick else "FULL"
    args = ("_modes_point.py", mode, steps, count, calls, size)
    if quick:
        return run_point(*args, "seconds,memory", threads=1)
    return run_point(*args, "seconds", threads=1) | run_point(*args, "memory", threads=1)


def compare(reverse: Point, forward: Point) -> Point:
    """Forward relative to reverse at the same number of steps and hyperparameters."""
    pairs = list(zip(reverse["gradient"], forward["gradient"], strict=True))
    norm = math.sqrt(sum(a * a for a, _ in pairs))
    return {
        "steps": forward["steps"],
        "hyperparameters": forward["hyperparameters"],
        "peak_ratio": forward["peak_bytes"] / max(reverse["peak_bytes"], 1),
        "time_ratio": forward["seconds"] / reverse["seconds"],
        "cpu_ratio": forward["cpu_seconds"] / max(reverse["cpu_seconds"], 1e-9),
        "gradient_error": math.sqrt(sum((a - b) ** 2 for a, b in pairs)) / norm,
    }


def break_even(rows: list[Point]) -> float | None:
    """Number of hyperparameters at which both take the same time: linear between the two nearest points."""
    rows = sorted(rows, key=lambda row: row["hyperparameters"])
    for low, high in pairwise(rows):
        a, b = low["time_ratio"], high["time_ratio"]
        if a <= 1 < b:
            k, gap = low["hyperparameters"], high["hyperparameters"] - low["hyperparameters"]
            return k + gap * (1 - a) / (b - a)
    return None


def table(points: list[Point], rows: list[Point]) -> Table:
    size = points[0]["parameter_bytes"] / MEGABYTE
    shown = Table(title="forward beside reverse (mixed) mode", caption=f"P = {size:.3f} MB")
    for column in ("T", "k", "mode", "peak MB", "ratio", "wall s", "ratio", "CPU s", "first s", "error"):
        shown.add_column(column, justify="left" if column == "mode" else "right")
    found = {(row["steps"], row["hyperparameters"]): row for row in rows}
    for p in points:
        row = found[p["steps"], p["hyperparameters"]] if p["mode"] == "forward" else None
        shown.add_row(
            str(p["steps"]),
            str(p["hyperparameters"]),
            p["mode"],
            f"{p['peak_bytes'] / MEGABYTE:.2f}",
            f"{row['peak_ratio']:.2f}x" if row else "",
            f"{p['seconds']:.3f}",
            f"{row['time_ratio']:.2f}x" if row else "",
            f"{p['cpu_seconds']:.2f}",
            f"{p['first_call_seconds']:.2f}",
            f"{row['gradient_error']:.1e}" if row else "",
            end_section=row is not None,
        )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, T=2: does it still run?")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of inner steps (default 50 200)")
    parser.add_argument("--counts", type=int, nargs="*", help="numbers of hyperparameters at the least T")
    parser.add_argument("--calls", type=int, help="calls per median (default 3; 1 with --quick)")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/modes.json)")
    given = parser.parse_args()
    given.steps = sorted(set(given.steps or ([2] if given.quick else [50, 200])))
    usual = [1] if given.quick else [1, 2, 4, 8, 16, 32]
    given.counts = sorted(set(usual if given.counts is None else given.counts) - {FEW})
    given.calls = given.calls or (1 if given.quick else 3)
    # A quick run says nothing about speed: it must not replace real results.
    given.out = given.out or (HERE / "tmp" if given.quick else RESULTS) / "modes.json"
    return given


def main() -> None:
    args = arguments()
    console = Console(width=110)
    load = busy(console)
    keys = sorted([(t, FEW) for t in args.steps] + [(args.steps[0], k) for k in args.counts])
    with console.status("measuring"):
        points = [measure(mode, t, k, args.calls, args.quick) for t, k in keys for mode in MODES]
    rows = [compare(one, two) for one, two in zip(points[::2], points[1::2], strict=True)]
    even = break_even([row for row in rows if row["steps"] == args.steps[0]])
    console.print(table(points, rows))
    if even is not None:
        console.print(f"both take the same time at k = {even:.1f} (T = {args.steps[0]})")
    write(args.out, load, points, ratios=rows, break_even=even)
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
