"""Memory and time of mlc beside the plain unroll, over the number of inner steps.

The W1 transformer of the design (``_w1.py``), Adam, the initial parameters as meta-parameters; mlc is asked for the
smallest memory, ``memory="min"`` (``planner.py`` has the whole curve). Every point
is measured in processes of its own, after a warm-up: seconds under ordinary malloc, and in another process
the peak, with malloc returning memory at once (which makes calls about three times as slow). Peaks are what
the operating system sees beyond what was resident before the call, so they hold the hypergradient (P, the
bytes of the parameters) and what libraries allocate.

    python benchmarks/spine.py [--quick] [--steps 1 2 4] [--calls 5] [--out FILE]
"""

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _results import HERE, RESULTS, busy, run_point, write
from rich.console import Console
from rich.table import Table

MEGABYTE = 1e6
METHODS = ("plain", "mlc")
Point = dict[str, Any]


def measure(method: str, steps: int, calls: int, folder: Path) -> tuple[Point, Path]:
    """One point of W1, and the file with its gradient."""
    file = folder / f"{method}{steps}.npy"
    args = ("_spine_point.py", method, steps, calls, "W1")
    return run_point(*args, "seconds", file) | run_point(*args, "memory", file), file


def measure_quickly(method: str, steps: int, calls: int, folder: Path) -> tuple[Point, Path]:
    """The same for the small model in one process with one thread: it says nothing about speed."""
    file = folder / f"{method}{steps}.npy"
    args = ("_spine_point.py", method, steps, calls, "SMALL", "seconds,memory", file)
    return run_point(*args, threads=1), file


def measure_all(steps: list[int], calls: int, quick: bool) -> list[Point]:
    """The plain unroll's point and mlc's at each number of steps; mlc's know their gradient's error."""
    keys = [(method, t) for t in steps for method in METHODS]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2 if quick else 1) as pool:
        one = measure_quickly if quick else measure
        found = dict(zip(keys, pool.map(lambda key: one(*key, calls, Path(folder)), keys), strict=True))
        gradients = {key: np.load(file) for key, (_, file) in found.items()}
    for t in steps:
        plain, ours = gradients["plain", t], gradients["mlc", t]
        found["mlc", t][0]["gradient_error"] = float(np.linalg.norm(ours - plain) / np.linalg.norm(plain))
    return [point for point, _ in found.values()]


def compare(plain: Point, ours: Point) -> Point:
    """One row of the result: mlc relative to the plain unroll at the same number of steps."""
    return {
        "steps": ours["steps"],
        "peak_ratio": ours["peak_bytes"] / plain["peak_bytes"],
        "time_ratio": ours["seconds"] / plain["seconds"],
        "cpu_ratio": ours["cpu_seconds"] / plain["cpu_seconds"],
        "gradient_error": ours["gradient_error"],
    }


def growth(points: list[Point], method: str) -> float | None:
    """Growth of the peak per inner step in P, from T=4 (or the least T measured) to the largest T."""
    peaks = {p["steps"]: p["peak_bytes"] for p in points if p["method"] == method}
    low, high = max(min(peaks), 4 if 4 in peaks else 0), max(peaks)
    if low == high:
        return None
    return (peaks[high] - peaks[low]) / (high - low) / points[0]["parameter_bytes"]


def targets(ratios: list[Point], growths: dict[str, float | None]) -> list[Point]:
    """What the project promised for this benchmark, beside what was measured (None: not measured)."""
    by_steps = {row["steps"]: row for row in ratios}
    wanted = [
        ("peak at T=8 over the plain unroll's", 0.15, by_steps.get(8, {}).get("peak_ratio")),
        ("growth per inner step in P", 4.0, growths["mlc"] if {4, 16} <= by_steps.keys() else None),
        ("time at T=4 over the plain unroll's", 1.4, by_steps.get(4, {}).get("time_ratio")),
    ]
    return [{"what": what, "at_most": most, "measured": measured} for what, most, measured in wanted]


def table(points: list[Point], ratios: list[Point]) -> Table:
    size = points[0]["parameter_bytes"] / MEGABYTE
    shown = Table(title="mlc beside the plain unroll", caption=f"P = {size:.2f} MB")
    columns = (
        "T",
        "method",
        "peak MB",
        "of plain",
        "wall s",
        "of plain",
        "CPU s",
        "first s",
        "gradient error",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column == "method" else "right")
    by_steps = {row["steps"]: row for row in ratios}
    for p in points:
        row = by_steps[p["steps"]] if p["method"] == "mlc" else None
        shown.add_row(
            str(p["steps"]),
            p["method"],
            f"{p['peak_bytes'] / MEGABYTE:.1f}",
            f"{row['peak_ratio']:.1%}" if row else "",
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
    parser.add_argument("--quick", action="store_true", help="a tiny model, T=1 and 2: does it still run?")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of inner steps (default 1 2 4 8 16)")
    parser.add_argument("--calls", type=int, help="calls per median (default 3; 1 with --quick)")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/spine.json)")
    given = parser.parse_args()
    given.steps = sorted(set(given.steps or ([1, 2] if given.quick else [1, 2, 4, 8, 16])))
    given.calls = given.calls or (1 if given.quick else 3)
    # A quick run says nothing about speed: it must not replace real results.
    given.out = given.out or (HERE / "tmp" if given.quick else RESULTS) / "spine.json"
    return given


def main() -> None:
    args = arguments()
    console = Console(width=110)
    load = busy(console)
    with console.status("measuring"):
        points = measure_all(args.steps, args.calls, args.quick)
    ratios = [compare(plain, ours) for plain, ours in zip(points[::2], points[1::2], strict=True)]
    growths = {method: growth(points, method) for method in METHODS}
    promised = [] if args.quick else targets(ratios, growths)
    console.print(table(points, ratios))
    for method, value in growths.items():
        if value is not None:
            console.print(f"growth per inner step, {method}: {value:.2f} P")
    for goal in promised:
        if goal["measured"] is not None:
            verdict = "met" if goal["measured"] <= goal["at_most"] else "[bold]missed[/bold]"
            console.print(f"{goal['what']}: {goal['measured']:.3f}, wanted at most {goal['at_most']}: {verdict}")
    write(args.out, load, points, ratios=ratios, growth_in_parameters=growths, targets=promised)
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
