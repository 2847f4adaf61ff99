"""Is the planner's choice near the best there is? Every combination of levers against it, on small workloads.

For each workload and budget: the plan that the planner chooses, and the fastest of all points of a grid over the
levers (mode, price of a byte, sets of states, micro-batches) whose predicted peak fits. Both are then run, in turns,
by the interpreter; the ratio of their measured times is printed next to that of the predicted ones.

    python benchmarks/bruteforce.py [--workload rates ...] [--budgets 6] [--calls 7] [--full]
"""

import argparse
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _measure
import _workloads
import numpy as np
import torch
from _results import RESULTS, busy, write
from _workloads.workload import Workload
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mlc
from mlc.ir.lowered.contract import Levers
from mlc.ir.program import Program
from mlc.passes.planning.planned import joint_of
from mlc.passes.planning.planner import FEW, usable
from mlc.passes.planning.search import Candidate, Search

WORKLOADS = ("W1", "digits", "rates", "hyperparameters")
PRICES = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 128.0, 512.0, 2048.0, 16384.0)
PARTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Pair:
    """A budget, what the planner chose for it, and the best of the grid."""

    budget: int
    chosen: mlc.Plan
    best: Candidate


def grid(program: Program, modes: list[str]) -> list[Candidate]:
    """Every combination of levers, one of each kind that is predicted to cost the same."""
    found: dict[tuple[float, int], Candidate] = {}
    for mode in modes:
        search = Search(mode, joint_of(program, mlc.plan(program, flows=mode)))
        n = search.trips
        slots = sorted({1, 2, round(n ** (1 / 3)), round(n**0.5), n // 3} - {0})
        prices = [p * search.meter.rates.unit for p in PRICES]
        for levers in track(list(itertools.product(prices, [None, *slots], PARTS)), f"{mode} mode", transient=True):
            c = search.at(Levers(*levers))
            found.setdefault((c.seconds, c.peak), c)
    return list(found.values())


def pairs(program: Program, points: list[Candidate], count: int) -> list[Pair]:
    """The planner against the grid, at budgets in equal ratios."""
    peaks = [c.peak for c in points]
    out = []
    for budget in np.geomspace(min(peaks) * 1.1, max(peaks), count):
        fitting = [c for c in points if c.peak <= usable(int(budget))]
        chosen = mlc.plan(program, memory=int(budget), backend="interpreter")
        out.append(Pair(int(budget), chosen, min(fitting, key=lambda c: c.seconds)))
    return out


def measured(w: Workload, p: Pair, calls: int) -> tuple[float, float]:
    """Median seconds of both, measured in turns."""
    best = {"price": p.best.levers.price, "slots": p.best.levers.slots, "parts": p.best.levers.parts}
    chosen = {"price": p.chosen.price, "slots": p.chosen.slots, "parts": p.chosen.parts}
    both = [
        mlc.compile(w.fn, backend="interpreter", flows=mode, levers=levers)
        for mode, levers in ((p.chosen.mode, chosen), (p.best.mode, best))
    ]

    def call(loop: Any) -> None:
        torch.autograd.grad(loop(*w.args), w.meta)

    seconds: list[list[float]] = [[], []]
    for i in range(calls + 1):
        for loop, into in zip(both, seconds, strict=True):
            w.reset()
            wall, _ = _measure.timed(lambda loop=loop: call(loop))
            into.extend([wall] if i else [])  # the first call traces
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def row(w: Workload, p: Pair, calls: int) -> dict[str, Any]:
    """One budget, as it stands in the result file."""
    same = (p.chosen.price, p.chosen.slots, p.chosen.parts) == (
        p.best.levers.price, p.best.levers.slots, p.best.levers.parts
    )  # fmt: skip
    one, two = (1.0, 1.0) if same else measured(w, p, calls)
    return {
        "workload": w.name, "machine": _measure.machine(), "shape": w.shape, "budget": p.budget,
        "chosen": {"mode": p.chosen.mode, "price": p.chosen.price, "slots": p.chosen.slots, "parts": p.chosen.parts,
                   "seconds": p.chosen.seconds, "peak": p.chosen.peak_bytes},
        "best": {"mode": p.best.mode, "price": p.best.levers.price, "slots": p.best.levers.slots,
                 "parts": p.best.levers.parts, "seconds": p.best.seconds, "peak": p.best.peak},
        "predicted_ratio": p.chosen.seconds / p.best.seconds, "measured_ratio": one / two,
    }  # fmt: skip


def text(x: dict[str, Any]) -> str:
    slots = "all" if x["slots"] is None else x["slots"]
    return f"{x['mode']}, {x['price'] * 1e9:.2g} ns/B, {slots} sets, {x['parts']} parts"


def main(args: argparse.Namespace) -> None:
    console = Console()
    load = busy(console)
    rows: list[dict[str, Any]] = []
    table = Table("workload", "budget MB", "planner", "best of the grid", "predicted", "measured")
    for name in args.workload:
        w = _workloads.build(name, not args.full)
        program = mlc.trace(w.fn, *w.args)
        few = sum(m.numel() for m in w.meta) <= FEW
        points = grid(program, ["mixed", "forward"] if few else ["mixed"])
        for p in pairs(program, points, args.budgets):
            r = row(w, p, args.calls)
            rows.append(r | {"grid": len(points)})
            table.add_row(name, f"{r['budget'] / 1e6:.3g}", text(r["chosen"]), text(r["best"]),
                          f"{r['predicted_ratio']:.2f}", f"{r['measured_ratio']:.2f}")  # fmt: skip
    console.print(table)
    for row_ in rows:
        row_["shape"] = {} if len(args.workload) > 1 else row_["shape"]
    write(Path(args.out), load, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--budgets", type=int, default=6)
    parser.add_argument("--calls", type=int, default=7)
    parser.add_argument("--full", action="store_true", help="sizes as planner.py measures them")
    parser.add_argument("--out", default=str(RESULTS / "bruteforce.json"))
    main(parser.parse_args())
