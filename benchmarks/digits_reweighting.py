"""Data reweighting on digits: the exact hypergradient beside the cheapest approximation of Betty.

One conv net and a net that weighs its losses (``_reweighting.py``), K inner steps for each outer one. Ways: Betty's
default ``darts`` (a central difference at the last inner step: two more forward passes), an exact unroll by hand
(``create_graph=True``), the same loop under ``mlc.compile`` and as ``mlc.Level``s in ``mlc.Training``, exact as well;
for mlc without a budget, and with the peak of darts as its budget. Seconds: all ways of one K
take turns in one process, one thread, medians after a warm-up. Peaks: a process each, malloc returning memory at
once; what the operating system sees beyond what was resident before the call (a few hundred kB are noise). The first
hypergradient of each is compared with an unroll by hand in float64.

    python benchmarks/digits_reweighting.py [--steps 1 5] [--calls 25] [--inductor] [--quick] [--out FILE]

``--inductor`` adds mlc with compiled segments: minutes of compilation the first time.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _results import HERE, RESULTS, busy, run_point, write
from rich.console import Console
from rich.table import Table

DARTS = "betty:darts"
MEGABYTE = 1e6
Point = dict[str, Any]


def has_betty() -> bool:
    return importlib.util.find_spec("betty") is not None or (Path(sys.prefix) / "peers" / "betty").is_dir()


def measure(steps: int, args: argparse.Namespace, folder: Path) -> list[Point]:
    """The points of one K, with their errors and their ratios to darts (to the unroll by hand without Betty)."""
    ways = [*([DARTS] if has_betty() else []), "hand", "levels", "mlc:none:auto"]
    ways += ["mlc:none:inductor"] * args.inductor
    memory = {way: peak(way, steps, args, folder) for way in ways}
    if DARTS in memory:
        as_darts = f"mlc:{memory[DARTS]['peak_bytes']}:auto"
        ways.append(as_darts)
        memory[as_darts] = peak(as_darts, steps, args, folder)
    options = ["--quick"] if args.quick else []
    run_point("_reweighting_point.py", steps, "memory", 1, folder, "hand64", *options, threads=1)
    ways = [w for w in ways if "failed" not in memory[w]]
    found = run_point("_reweighting_point.py", steps, "seconds", args.calls, folder, *ways, *options, threads=1)
    points = [{**memory[p["way"]], **p} for p in found["points"]]
    exact = np.load(folder / "hand64.npy")
    base = points[0]
    for p in points:
        mine = np.load(folder / f"{p['way'].replace(':', '-')}.npy")
        p["gradient_error"] = float(np.linalg.norm(mine - exact) / np.linalg.norm(exact))
        p["gradient_cosine"] = float(mine @ exact / np.linalg.norm(mine) / np.linalg.norm(exact))
        p["cpu_ratio"] = p["cpu_seconds"] / base["cpu_seconds"]
        p["peak_ratio"] = p["peak_bytes"] / base["peak_bytes"]
    return points + [p for p in memory.values() if "failed" in p]


def peak(way: str, steps: int, args: argparse.Namespace, folder: Path) -> Point:
    """Memory of one way; a budget that no plan keeps is a fact, not the end."""
    options = ["--quick"] if args.quick else []
    try:
        calls = 1 if args.quick else 5
        found = run_point("_reweighting_point.py", steps, "memory", calls, folder, way, *options, threads=1)
        return found["points"][0]
    except SystemExit as e:
        if "BudgetError" not in str(e):
            raise
        return {"way": way, "inner_steps": steps, "failed": str(e).strip().splitlines()[-1]}


def label(way: str) -> str:
    kind, _, rest = way.partition(":")
    if kind != "mlc":
        return {"hand": "unroll by hand", "levels": "mlc.Training"}.get(kind, f"Betty {rest}")
    memory, _, backend = rest.partition(":")
    shown = {"none": "no budget", "min": 'memory="min"'}.get(memory)
    return f"mlc.compile, {shown or f'{int(memory) / MEGABYTE:.1f} MB'}" + (", inductor" if backend != "auto" else "")


def table(steps: int, points: list[Point]) -> Table:
    shown = Table(title=f"one outer step, K = {steps}", caption=f"ratios: to {label(points[0]['way'])}")
    for column in ("way", "CPU ms", "ratio", "wall ms", "peak MB", "ratio", "predicted", "gradient error", "cosine"):
        shown.add_column(column, justify="left" if column == "way" else "right")
    for p in points:
        if "failed" in p:
            shown.add_row(label(p["way"]), f"[dim]{p['failed']}[/dim]")
            continue
        planned = p.get("planned_peak_bytes")
        shown.add_row(
            label(p["way"]), f"{p['cpu_seconds'] * 1e3:.1f}", f"{p['cpu_ratio']:.2f}", f"{p['seconds'] * 1e3:.1f}",
            f"{p['peak_bytes'] / MEGABYTE:.1f}", f"{p['peak_ratio']:.2f}",
            f"{planned / MEGABYTE:.1f}" if planned is not None else "",
            f"{p['gradient_error']:.1e}", f"{p['gradient_cosine']:.4f}",
        )  # fmt: skip
    return shown


def main(args: argparse.Namespace) -> None:
    console = Console(width=130)
    load, points = busy(console), []
    if not has_betty():
        console.print("[bold]Betty is not installed (make bench does it): ratios are to the unroll by hand[/bold]")
    with tempfile.TemporaryDirectory() as folder:
        for steps in args.steps:
            with console.status(f"K = {steps}"):
                found = measure(steps, args, Path(folder))
            console.print(table(steps, found))
            points += found
            write(args.out, load, points)
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", help="inner steps (default 1 5)")
    parser.add_argument("--calls", type=int, help="calls per median (default 25)")
    parser.add_argument("--inductor", action="store_true", help="mlc with compiled segments too")
    parser.add_argument("--quick", action="store_true", help="a tiny net: does it still run?")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/digits_reweighting.json)")
    given = parser.parse_args()
    given.steps = given.steps or ([1] if given.quick else [1, 5])
    given.calls = given.calls or (2 if given.quick else 25)
    given.out = given.out or (HERE / "tmp" if given.quick else RESULTS) / "digits_reweighting.json"
    main(given)
