"""What a precision policy saves and costs: predicted memory, and the hypergradient beside that of float64.

Two workloads (``_workloads``): W1, the decoder-only transformer under Adam, and the conv net on digits under SGD with
momentum. For each policy the loop is compiled and differentiated once over float32 values; its hypergradient is
compared with the plain unroll of the same functions in float64 under PyTorch's own autograd. Peaks are predicted by the
types of the plan (a CPU without instructions for it computes bfloat16 no faster, so seconds are left out).

    python benchmarks/precision.py [--workload W1 digits] [--policy NAME ...] [--quick] [--out FILE]

Points that were not asked for stay in the file; where sizes differ they are dropped.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _measure
import numpy as np
import torch
from _results import RESULTS, busy, write
from _variants import eager
from _variants.prepared import flat, of_tensors
from _workloads import digits, transformer
from _workloads.workload import Workload
from rich.console import Console
from rich.table import Table

import mlc
from mlc.units import size_text

POLICIES: dict[str, Any] = {
    "float32": None,
    "bf16": "bf16",
    "product bf16": {"L1 -> L0": "bf16"},
    "bf16, stored bf16": mlc.Precision(compute="bf16", store="bf16"),
    "residuals int8": mlc.Precision(store="int8"),
    "bf16, residuals int8": mlc.Precision(compute="bf16", store="int8"),
}
WORKLOADS: dict[str, Callable[[bool, torch.dtype], Workload]] = {"W1": transformer.w1, "digits": digits.build}
MEMORY = {"fastest": None, "least": "min"}
Point = dict[str, Any]


def measure(name: str, policy: str, memory: str, exact: np.ndarray, quick: bool) -> Point:
    """One policy on one workload; mlc's own measurement of its first call as well."""
    w = WORKLOADS[name](quick, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        f = mlc.compile(w.fn, precision=POLICIES[policy], memory=MEMORY[memory], backend="interpreter")
        found = flat(g.detach().cpu() for g in torch.autograd.grad(f(*w.args), w.meta))
    plan = f.plan
    assert plan is not None
    saved = next((d for d in plan.decisions if d.subject.startswith("saved by")), None)
    cost = next((d.choice for d in plan.decisions if d.subject == "precision cost"), "")
    return {
        "machine": _measure.machine(), "shape": {}, "workload": name, "policy": policy, "memory": memory,
        "cosine": float(found @ exact / (np.linalg.norm(found) * np.linalg.norm(exact))),
        "norm": float(np.linalg.norm(found) / np.linalg.norm(exact)), "peak_bytes": plan.peak_bytes,
        "saved_bytes": None if saved is None else saved.bytes, "saved": "" if saved is None else saved.reason,
        "first_call": cost, "warned": [str(c.message) for c in caught if isinstance(c.message, mlc.PrecisionWarning)],
    }  # fmt: skip


def show(console: Console, name: str, points: list[Point]) -> None:
    """The points of a workload; peaks relative to float32 under the same demand on memory."""
    table = Table(title=name)
    for column in ("policy", "plan", "cosine", "norm", "peak", "of float32", "saved"):
        table.add_column(column, justify="left" if column in ("policy", "plan") else "right")
    whole = {p["memory"]: p["peak_bytes"] for p in points if p["policy"] == "float32"}
    for p in points:
        saved = "" if p["saved_bytes"] is None else f"{size_text(p['saved_bytes'])} ({p['saved'].split('; ')[-1]})"
        table.add_row(
            p["policy"], p["memory"], f"{p['cosine']:.6f}", f"{p['norm']:.4f}", size_text(p["peak_bytes"]),
            f"{p['peak_bytes'] / whole[p['memory']]:.3f}" if p["memory"] in whole else "", saved,
        )  # fmt: skip
    console.print(table)


def merged(points: list[Point], shapes: dict[str, Any], file: Path) -> list[Point]:
    """The new points, and those of the file that were measured at the same sizes and not again."""
    old = json.loads(file.read_text()) if file.exists() else {"points": [], "shape": {}}
    again = {_key(p) for p in points}
    kept = [
        p for p in old["points"]
        if _key(p) not in again and shapes.get(p["workload"]) in (None, old["shape"][p["workload"]])
    ]  # fmt: skip
    return [p | {"shape": old["shape"] | shapes} for p in points + kept]


def _key(p: Point) -> tuple[str, str, str]:
    return p["workload"], p["policy"], p["memory"]


def main(args: argparse.Namespace) -> None:
    console = Console(width=140)
    load, points, shapes = busy(console), [], {}
    for name in args.workload:
        w = WORKLOADS[name](args.quick, torch.float64)
        shapes[name], exact = w.shape, of_tensors(eager.plain(w))
        mine = [measure(name, p, m, exact, args.quick) for p in args.policy for m in MEMORY]
        show(console, name, mine)
        points += mine
    write(args.out, load, merged(points, shapes, args.out))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--policy", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    main(parser.parse_args())
