"""Responses of a level against closed forms, theory, Betty and TorchOpt, in float64.

Four bilevel problems whose hypergradient is known (``_closed.py``): quadratics of condition number 7 and 650, logistic
regression with a penalty of 1 and of 0.01. The lower level starts at its solution, so the errors are those of the
response alone. Three tables each: linear solvers after k products beside what theory (dense linear algebra) says that
they reach, and beside Betty and TorchOpt for the same k; the solvers to their tolerance (wanted: at most 1e-10); and
responses that are unrolled, for which theory is a Neumann series of as many terms as steps. Errors are relative.

Products are those with the Hessian: mlc's Neumann series spends twelve on the largest eigenvalue, which the others
are told, and Krylov solvers one on the final residual. Nystrom is damped by the smallest eigenvalue. Theory of CG is
that of exact arithmetic; at condition 650 rounding makes every CG late by k = 40.

    python benchmarks/responses.py [--problem quadratic7 ...] [--products 5 20] [--quick] [--out FILE]
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _closed
import _closed_ways as ways
import _measure
import torch
from _closed import Closed
from _results import HERE, RESULTS, busy, write
from rich.console import Console
from rich.table import Table

import mlc

TOLERANCE, WANTED = 1e-14, 1e-10
Point = dict[str, Any]


def smallest(p: Closed) -> float:
    return float(torch.linalg.eigvalsh(p.hessian).min())


# Solver -> what x theory expects after k products.
THEORY: dict[str, Callable[[Closed, int], torch.Tensor]] = {
    "cg": _closed.cg,
    "gmres": _closed.gmres,
    "neumann": _closed.neumann,
    "nystrom": lambda p, k: _closed.nystrom(p, min(k, len(p.star)), smallest(p)),
}
PEERS: dict[str, dict[str, ways.Way]] = {
    "TorchOpt": {"cg": ways.torchopt("cg"), "neumann": ways.torchopt("neumann")},
    "Betty": {"cg": ways.betty("cg"), "neumann": ways.betty("neumann"), "darts": ways.betty("darts")},
}


def measured(p: Closed, way: ways.Way, k: int) -> Point:
    """Error and seconds of one hypergradient, compilation included for mlc; what is not installed says so."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        found, facts = way(p, k)
    except ImportError as e:
        return {"skipped": f"needs {e.name}: make bench installs it"}
    took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return {"error": p.error(found), **facts, **took}


def solvers(p: Closed, counts: list[int]) -> list[Point]:
    """Every solver after k products."""
    points = []
    for k in counts:
        for solver, theory in THEORY.items():
            options = {"damping": smallest(p)} if solver == "nystrom" else {}
            shared = {"kind": "solver", "solver": solver, "k": k}
            expected = {"predicted": p.error(p.hypergradient(theory(p, k)))}
            points.append(shared | {"by": "mlc"} | expected | measured(p, ways.implicit(solver, **options), k))
            points += [
                shared | {"by": name} | measured(p, way[solver], k) for name, way in PEERS.items() if solver in way
            ]
    return points


def to_tolerance(p: Closed) -> list[Point]:
    """CG and GMRES until their tolerance."""
    points = []
    for solver in ("cg", "gmres"):
        response = mlc.Implicit(solver, steps=2000, tol=TOLERANCE)
        found = measured(p, lambda p, k, r=response: ways.by_mlc(p, r), 0)
        points.append({"kind": "tolerance", "solver": solver, "by": "mlc", "predicted": WANTED} | found)
    return points


def unrolled(p: Closed) -> list[Point]:
    """Responses that go through steps; FullyFirstOrder also has a bias of the order of 1 / penalty."""
    steps, points = ways.STEPS, []
    cases = [(mlc.Unroll(), steps), (mlc.Truncated(steps // 2), steps // 2), (mlc.FiniteDifference(), steps),
             (mlc.FullyFirstOrder(1e2), steps), (mlc.FullyFirstOrder(1e4), steps)]  # fmt: skip
    for response, terms in cases:
        expected = p.error(p.hypergradient(_closed.neumann(p, terms)))
        found = measured(p, lambda p, k, r=response: ways.by_mlc(p, r, ways.STEPS), 0)
        points.append({"kind": "unrolled", "solver": str(response), "by": "mlc", "predicted": expected} | found)
    points.append({"kind": "unrolled", "solver": "darts", "by": "Betty"} | measured(p, PEERS["Betty"]["darts"], 1))
    points.append(first_order(p))
    return points


def first_order(p: Closed) -> Point:
    """FirstOrder has nothing left here, as the meta-parameters enter nowhere but the inner gradient: it must say so."""
    try:
        ways.by_mlc(p, mlc.FirstOrder())
    except mlc.PlanError as e:
        return {"kind": "unrolled", "solver": "FirstOrder()", "by": "mlc", "refused": e.what}
    return {"kind": "unrolled", "solver": "FirstOrder()", "by": "mlc", "refused": None}


def number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def show(console: Console, p: Closed, points: list[Point]) -> None:
    shown = Table(title=f"{p.name} (condition of the Hessian {p.condition:.3g})")
    for column in ("response", "k", "theory", "mlc", "products", "CPU s", *PEERS):
        shown.add_column(column, justify="left" if column == "response" else "right")
    for mine in (x for x in points if x["by"] == "mlc"):
        beside = {x["by"]: x for x in points if (x["solver"], x.get("k")) == (mine["solver"], mine.get("k"))}
        wanted = f"<= {WANTED:.0e}" if mine["kind"] == "tolerance" else number(mine.get("predicted"))
        name = f"{mine['solver']} to {TOLERANCE:.0e}" if mine["kind"] == "tolerance" else mine["solver"]
        if "refused" in mine:
            shown.add_row(name, "", "no path", "refused" if mine["refused"] else "[bold]not refused[/bold]")
            continue
        others = [number(beside[x].get("error")) if mine["kind"] == "solver" and x in beside else "" for x in PEERS]
        shown.add_row(name, str(mine.get("k", "")), wanted, number(mine["error"]), str(mine.get("products", "")),
                      f"{mine['cpu_seconds']:.2f}", *others)  # fmt: skip
    for darts in (x for x in points if x["solver"] == "darts"):
        shown.caption = f"Betty darts: {number(darts['error'])}" if "error" in darts else darts["skipped"]
    console.print(shown)


def main(args: argparse.Namespace) -> None:
    console = Console(width=120)
    load, points = busy(console), []
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # solvers that are stopped early say so
    for name in args.problem:
        p = _closed.PROBLEMS[name]()
        with console.status(p.name):
            found = solvers(p, args.products) + to_tolerance(p) + ([] if args.quick else unrolled(p))
        show(console, p, found)
        about = {"problem": name, "condition": p.condition, "machine": _measure.machine(), "shape": {"problems": 4}}
        points += [x | about for x in found]
    reached = all(x["error"] <= WANTED for x in points if x["kind"] == "tolerance")
    console.print(f"CG and GMRES to tolerance reach {WANTED:.0e}: {'met' if reached else '[bold]missed[/bold]'}")
    write(args.out, load, points, reached=reached)
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="+", choices=list(_closed.PROBLEMS), help="default: all")
    parser.add_argument("--products", type=int, nargs="+", help="k (default 5 10 20 40)")
    parser.add_argument("--quick", action="store_true", help="one problem, k = 5, solvers only")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/responses.json)")
    given = parser.parse_args()
    given.problem = given.problem or (["quadratic7"] if given.quick else list(_closed.PROBLEMS))
    given.products = given.products or ([5] if given.quick else [5, 10, 20, 40])
    given.out = given.out or (HERE / "tmp" if given.quick else RESULTS) / "responses.json"
    main(given)
