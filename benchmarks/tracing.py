"""How long mlc takes before the first run: tracing, planning, lowering and generating code.

A 6-layer transformer (``_w1.py``) trained by Adam for 10 and for 40 steps, each in a fresh process, imports
not counted. Lowering must not depend on the number of steps; tracing may: it runs the loop over fake tensors.

    python benchmarks/tracing.py [--quick] [--steps 10 40] [--out FILE]
"""

import argparse
from pathlib import Path
from typing import Any

from _results import HERE, RESULTS, busy, run_point, write
from rich.console import Console
from rich.table import Table

# Seconds that the project promised per number of steps, for a machine with two cores.
PROMISED = {10: 10.0, 40: 12.0}
STAGES = ("trace", "plan", "lower", "generate")
Point = dict[str, Any]


def table(points: list[Point]) -> Table:
    shown = Table(title="seconds before the first run (wall, CPU)")
    for column in ("T", *STAGES, "total", "at most", "equations"):
        shown.add_column(column, justify="right")
    for p in points:
        pairs = [(p["seconds"][s], p["cpu_seconds"][s]) for s in STAGES]
        pairs.append((p["total_seconds"], p["total_cpu_seconds"]))
        shown.add_row(
            str(p["steps"]),
            *(f"{wall:.2f}, {cpu:.2f}" for wall, cpu in pairs),
            "" if p["at_most"] is None else f"{p['at_most']:.0f}",
            " + ".join(str(n) for n in p["equations"].values()),
        )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, T=2: does it still run?")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of inner steps (default 10 40)")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/tracing.json)")
    given = parser.parse_args()
    given.steps = sorted(set(given.steps or ([2] if given.quick else PROMISED)))
    # A quick run says nothing about speed: it must not replace real results.
    given.out = given.out or (HERE / "tmp" if given.quick else RESULTS) / "tracing.json"
    return given


def main() -> None:
    args = arguments()
    console = Console(width=110)
    load = busy(console)
    points = []
    for steps in args.steps:
        with console.status(f"T={steps}"):
            points.append(run_point("_tracing_point.py", steps, "SMALL" if args.quick else "SIX_LAYERS"))
        points[-1]["at_most"] = None if args.quick else PROMISED.get(steps)
    console.print(table(points))
    write(args.out, load, points)
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
