"""What an implicit hypergradient of the W1 transformer costs: products, peak memory, seconds.

W1 (``_w1.py``) is trained with Adam under a Gaussian prior whose mean and log precision are learned for every weight:
1.8 million meta-parameters. ``mlc.Implicit("cg")`` answers for the level, so the hypergradient is a linear solve at the
last step. Points: inner steps T, CG steps; and one product alone (CG of one step), what the peaks are measured
against. Wanted: one product per CG step, and a peak of at most 1.2 times that of one product, whatever T is. Peaks
are what the operating system sees beyond what was resident before the call, in a process each; seconds are of the
same process, so they are slow (malloc returns memory at once). Beside: the exact unroll, and one Hessian-vector
product of the same loss by PyTorch's double backward.

    python benchmarks/implicit.py [--steps 4 16 64] [--solve 10] [--memory none] [--quick] [--out FILE]
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _measure
import _w1
import torch
from _results import HERE, RESULTS, busy, run_point, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mlc

MEGABYTE = 1e6
Point = dict[str, Any]


def prior(model: nn.Module, means: Sequence[Tensor], logs: Sequence[Tensor]) -> Tensor:
    """-log of a Gaussian prior per weight, up to a constant."""
    parts = zip(model.parameters(), means, logs, strict=True)
    return sum((0.5 * (u.exp() * (w - m).square()).sum() for w, m, u in parts), torch.zeros(()))


def trained(model: nn.Module, means: Sequence[Tensor], logs: Sequence[Tensor], batches: Sequence[Tensor],
            validation: Tensor) -> Tensor:  # fmt: skip
    opt = torch.optim.Adam(model.parameters(), lr=_w1.LR, eps=1e-6)
    with mlc.level("inner"):
        for tokens in batches:
            opt.zero_grad()
            (_w1.next_token(model(tokens[:, :-1]), tokens) + prior(model, means, logs)).backward()
            opt.step()
    return _w1.next_token(model(validation[:, :-1]), validation)


def double_backward(shape: _w1.Shape) -> Point:
    """One product with the Hessian by PyTorch itself; fused attention has no second derivative, so it is spelt out."""
    _measure.return_memory()
    model, batches, _ = _w1.problem(shape, 1, _measure.DEVICE)
    means = [p.detach().clone() for p in model.parameters()]
    logs = [torch.zeros_like(p) for p in model.parameters()]
    params, tokens = list(model.parameters()), batches[0]
    direction = [torch.ones_like(p) for p in params]

    def call() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            loss = _w1.next_token(model(tokens[:, :-1]), tokens) + prior(model, means, logs)
            grads = torch.autograd.grad(loss, params, create_graph=True)
            torch.autograd.grad(grads, params, direction)

    return measured(call) | {"method": "double backward", "steps": 1, "products": 1, "iterations": 1, "solve": 1}


def measured(call: Callable[[], None]) -> Point:
    """First call, then the peak and the seconds of another."""
    began = time.perf_counter()
    call()
    found: Point = {"first_call_seconds": time.perf_counter() - began}

    def timed() -> None:
        found["seconds"], found["cpu_seconds"] = _measure.timed(call)

    found["peak_bytes"] = _measure.peak_bytes(timed)
    return found


def point(steps: int, solve: int, memory: str, shape: _w1.Shape) -> Point:
    """One process's measurement; ``solve`` of 0 is the exact unroll."""
    warnings.simplefilter("ignore")  # four steps from the start are no solution, and it says so
    _measure.return_memory()
    model, batches, validation = _w1.problem(shape, steps, _measure.DEVICE)
    means = [p.detach().clone().requires_grad_() for p in model.parameters()]
    logs = [torch.zeros_like(p).requires_grad_() for p in model.parameters()]
    response = mlc.Implicit("cg", steps=solve, tol=0.0) if solve else mlc.Unroll()
    budget = None if memory == "none" else memory
    f = mlc.compile(trained, memory=budget, flows={"inner": response}, backend="interpreter")

    def call() -> None:
        loss = f(model, means, logs, batches, validation)
        torch.autograd.grad(loss, [*means, *logs])

    found = measured(call)
    report = f.report.solves.get("inner")
    return found | {
        "method": "Implicit" if solve else "Unroll", "steps": steps, "solve": solve, "memory": memory,
        "planned_peak_bytes": f.plan.peak_bytes, "meta_parameters": 2 * sum(p.numel() for p in model.parameters()),
        "products": report.products if report else None, "iterations": report.iterations if report else None,
        "residual": report.residual if report else None,
    }  # fmt: skip


def table(points: list[Point], base: Point) -> Table:
    shown = Table(title=f"W1, {points[0]['meta_parameters'] / 1e6:.2f} million meta-parameters")
    columns = ("T", "way", "CG steps", "products", "peak MB", "of one product", "predicted MB", "CPU s", "wall s")
    for column in columns:
        shown.add_column(column, justify="left" if column == "way" else "right")
    for p in points:
        planned = p.get("planned_peak_bytes")
        shown.add_row(
            str(p["steps"]), p["method"], str(p["iterations"] or ""), str(p["products"] or ""),
            f"{p['peak_bytes'] / MEGABYTE:.0f}", f"{p['peak_bytes'] / base['peak_bytes']:.2f}",
            f"{planned / MEGABYTE:.0f}" if planned else "", f"{p['cpu_seconds']:.2f}", f"{p['seconds']:.2f}",
        )  # fmt: skip
    return shown


def main(args: argparse.Namespace) -> None:
    console = Console(width=120)
    load, points = busy(console), []
    wanted = [(args.steps[0], 1), *((t, args.solve) for t in args.steps), (args.steps[0], 0), (1, -1)]
    for steps, solve in wanted:
        with console.status(f"T = {steps}"):
            size = "SMALL" if args.quick else "W1"
            points.append(run_point("implicit.py", "--point", f"{steps},{solve},{args.memory},{size}", threads=1))
    console.print(table(points, points[0]))
    solves = [p for p in points[1:] if p["method"] == "Implicit"]
    worst = max(p["peak_bytes"] for p in solves) / points[0]["peak_bytes"]
    extra = max(p["products"] - p["iterations"] for p in solves)
    console.print(f"peak over one product's: {worst:.2f}, wanted at most 1.2: {'met' if worst <= 1.2 else 'missed'}")
    console.print(f"products beyond one per CG step: {extra} (the final residual)")
    write(args.out, load, points, peak_ratio=worst, extra_products=extra)
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", help="inner steps (default 4 16 64)")
    parser.add_argument("--solve", type=int, default=10, help="CG steps")
    parser.add_argument("--memory", default="none", help="budget for mlc: none, min or a size")
    parser.add_argument("--quick", action="store_true", help="a tiny model, T = 2 and 3: does it still run?")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/implicit.json)")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        steps, solve, memory, size = given.point.split(",")
        shape = getattr(_w1, size)
        found = point(int(steps), int(solve), memory, shape) if int(solve) >= 0 else double_backward(shape)
        print(json.dumps(found | {"shape": asdict(shape), "machine": _measure.machine()}))
        sys.exit()
    given.steps = given.steps or ([2, 3] if given.quick else [4, 16, 64])
    given.out = given.out or (HERE / "tmp" if given.quick else RESULTS) / "implicit.json"
    main(given)
