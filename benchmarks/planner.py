"""The time-memory curve of mlc, and where every other way to the same gradient stands.

Five workloads (``_workloads``), each with mlc at several budgets and its competitors: PyTorch's plain unroll
and per-step checkpoint, TorchOpt, a reverse loop that redoes every step, MixFlow-MG in JAX with and without
saved inner gradients, JAX with a checkpoint per step and, for few meta-parameters, forward mode. All have the
same model, data and initial values; each gradient is compared with a float64 unroll. Every variant is
measured in processes of its own after a warm-up: seconds under ordinary malloc, and in another process the
peak, with malloc returning memory at once (calls are then up to three times as slow). Peaks are what the
operating system sees beyond what was resident before the call: inputs are not in it, results are.

A tick is what one inner step costs in ordinary training steps (PyTorch, the same optimizer): the seconds
of a call, less one ordinary step for the outer gradient, over inner steps times an ordinary step.

    python benchmarks/planner.py [--workload W1 ...] [--variant plain ... mlc] [--budgets 8] [--quick]

Each workload leaves a JSON file and a picture in the folder ``--out``. Variants that are not asked for keep
the points that the file has already.
"""

import argparse
import datetime
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _results import HERE, RESULTS, PointFailed, busy, run_point, write
from rich.console import Console
from rich.table import Table

MEGABYTE = 1e6
WORKLOADS = ("W1", "W2", "digits", "rates", "hyperparameters")
COMPETITORS = (
    "plain", "checkpoint", "torchopt", "reverse", "mixflow-saved", "mixflow", "jax-checkpoint", "jax-forward",
)  # fmt: skip
Point = dict[str, Any]


def point(args: argparse.Namespace, workload: str, variants: str, what: str, folder: Path) -> list[Point]:
    """What one process measures; a process that fails becomes a point that says so."""
    options = ["--backend", args.backend, *(["--quick"] if args.quick else [])]
    threads = 1 if args.quick else None
    calls = args.calls
    try:
        script = "_planner_point.py"
        return run_point(script, workload, variants, calls, what, folder, *options, threads=threads)["points"]
    except PointFailed as e:
        last = str(e).strip().splitlines()[-1]
        return [{"variant": v, "workload": workload, "failed": last} for v in variants.split(",")]


def budgets(ends: Point, count: int) -> list[int]:
    """Bytes between the two ends of mlc's curve, in equal ratios, the ends left out."""
    low, high = ends["min_peak_bytes"], ends["none_peak_bytes"]
    return [int(b) for b in np.geomspace(low, high, count + 2)[1:-1]] if high > low else []


def variants(args: argparse.Namespace, ends: Point) -> list[str]:
    asked = [v for v in COMPETITORS if v in args.variant]
    if "mlc" in args.variant and "failed" not in ends:
        between = budgets(ends, args.budgets)
        asked += ["mlc:min", *(f"mlc:{b}" for b in between), "mlc:none"]
    return asked


def measure(args: argparse.Namespace, workload: str, folder: Path) -> tuple[Point, list[Point]]:
    """mlc's two ends with the ordinary step's seconds, and one point per variant."""
    what = "curve" if "mlc" in args.variant else "ordinary"
    (ends,) = point(args, workload, what, what, folder)
    names = variants(args, ends)
    if args.quick:  # one process for all: it says nothing about speed
        points = point(args, workload, ",".join(names), "seconds,memory", folder)
    else:
        points = []
        for name in names:
            (seconds,), (memory,) = (point(args, workload, name, what, folder) for what in ("seconds", "memory"))
            points.append(seconds | memory)
    point(args, workload, "reference", "reference", folder)
    return ends, [finished(p, folder) for p in points]


def finished(p: Point, folder: Path) -> Point:
    """A point with its gradient's error."""
    p["measured"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    gradient, reference = folder / f"{p['variant'].replace(':', '-')}.npy", folder / "reference.npy"
    if gradient.exists() and reference.exists():
        exact = np.load(reference)
        p["gradient_error"] = float(np.linalg.norm(np.load(gradient) - exact) / np.linalg.norm(exact))
    return p


def count_ticks(points: list[Point], step: float, steps: int) -> None:
    """Express seconds in ordinary steps of ``step`` seconds each, the same for all points of a file."""
    for p in points:
        if "seconds" in p:
            p["ordinary_steps"] = p["seconds"] / step
            p["ticks"] = (p["seconds"] - step) / steps / step


def disagreement(points: list[Point], folder: Path) -> float | None:
    """The largest difference between two variants' gradients, relative to the gradient."""
    files = [folder / f"{p['variant'].replace(':', '-')}.npy" for p in points]
    found = [np.load(f) for f in files if f.exists()]
    pairs = [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for i, a in enumerate(found) for b in found[:i]]
    return max(pairs, default=None)


def merged(points: list[Point], file: Path, asked: list[str]) -> list[Point]:
    """The new points, and from the file those of variants that were not asked for, in the usual order."""
    old = json.loads(file.read_text()) if file.exists() else {"points": []}
    kept = [p for p in old["points"] if family(p) not in asked]
    return sorted(kept + points, key=lambda p: (*COMPETITORS, "mlc").index(family(p)))


def family(p: Point) -> str:
    return p["variant"].split(":")[0]


def table(workload: str, points: list[Point], ends: Point) -> Table:
    step = ends.get("ordinary_step_seconds", float("nan"))
    shown = Table(title=workload, caption=f"an ordinary training step: {step * 1e3:.1f} ms")
    for column in ("variant", "peak MB", "predicted", "wall s", "CPU s", "ticks", "first s", "gradient error"):
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for p in points:
        why = p.get("failed") or p.get("skipped")
        if why:
            shown.add_row(label(p), f"[dim]{why.splitlines()[0]}[/dim]")
            continue
        shown.add_row(
            label(p),
            f"{p['peak_bytes'] / MEGABYTE:.1f}",
            f"{p['planned_peak_bytes'] / MEGABYTE:.1f}" if "planned_peak_bytes" in p else "",
            f"{p['seconds']:.3f}",
            f"{p['cpu_seconds']:.2f}",
            f"{p['ticks']:.2f}" if "ticks" in p else "",
            f"{p['first_call_seconds']:.1f}",
            f"{p['gradient_error']:.1e}" if "gradient_error" in p else "",
        )
    return shown


def label(p: Point) -> str:
    name, _, memory = p["variant"].partition(":")
    return f"{name} {int(memory) / MEGABYTE:.0f} MB" if memory.isdigit() else f"{name} {memory}".strip()


def one(args: argparse.Namespace, workload: str, load: float) -> tuple[str, list[Point], Point]:
    """Measure a workload and write its file and picture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ends, points = measure(args, workload, folder)
        apart = disagreement(points, folder)
    file = args.out / f"{workload}.json"
    ours = {k: ends[k] for k in ("min_peak_bytes", "none_peak_bytes", "ordinary_step_seconds") if k in ends}
    healthy = [p for p in points if "shape" in p]
    if healthy:
        points = merged(points, file, args.variant)
        shared = {k: healthy[0][k] for k in ("machine", "shape")}
        if "ordinary_step_seconds" in ends:
            count_ticks(points, ends["ordinary_step_seconds"], shared["shape"]["steps"])
        write(file, load, [shared | p for p in points], curve=ours, largest_disagreement=apart)
        draw(file, points)
    return workload, points, ends


def draw(file: Path, points: list[Point]) -> None:
    """The picture beside the JSON, where matplotlib is installed."""
    try:
        from _curve import picture
    except ImportError:
        return
    picture(file.with_suffix(".svg"), file.stem, points)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = (*COMPETITORS, "mlc")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--variant", nargs="+", choices=every, default=list(every))
    parser.add_argument("--budgets", type=int, help="budgets between mlc's two ends (default 8; 1 with --quick)")
    parser.add_argument("--calls", type=int, help="calls per median (default 5; 1 with --quick)")
    parser.add_argument("--backend", default="auto", help="mlc's backend (default auto)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it still run?")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/planner)")
    given = parser.parse_args()
    given.budgets = (1 if given.quick else 8) if given.budgets is None else given.budgets
    given.calls = given.calls or (1 if given.quick else 5)
    # A quick run says nothing about speed: it must not replace real results.
    given.out = given.out or (HERE / "tmp" if given.quick else RESULTS) / "planner"
    return given


def main() -> None:
    args = arguments()
    console = Console(width=130)
    load = busy(console)
    with ThreadPoolExecutor(2 if args.quick else 1) as pool:
        for workload, points, ends in pool.map(lambda w: one(args, w, load), args.workload):
            console.print(table(workload, points, ends))
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
