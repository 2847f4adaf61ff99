"""Points of planner.py: ``_planner_point.py WORKLOAD VARIANTS CALLS WHAT FOLDER [--quick] [--backend B]``.

VARIANTS are separated by commas (one for a measurement: each gets a process of its own); WHAT is ``seconds``,
``memory``, both with a comma, ``reference`` (the float64 gradient), ``ordinary`` (seconds of an ordinary step) or
``curve`` (that and mlc's two ends). Gradients are left in FOLDER. The last line printed is ``{"points": [...]}``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _measure
import _variants
import _workloads
import numpy as np
import torch
from _variants import eager
from _variants.prepared import Prepared, Skipped, of_tensors
from _workloads.workload import Workload

Facts = dict[str, Any]


def seconds(p: Prepared, calls: int) -> Facts:
    """Besides the seconds, how fast the machine was at this time: that of shared ones changes by half."""
    wall, cpu = zip(*(measured(p, _measure.timed) for _ in range(calls)), strict=True)
    return {
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "all_seconds": wall,
        "all_cpu_seconds": cpu,
        "matmul_gflops": matmul_gflops(),
    }


def matmul_gflops(size: int = 1024, calls: int = 9) -> float:
    """Billions of operations per second of a float32 matrix product in PyTorch (median)."""
    a = torch.ones(size, size, device=_measure.DEVICE)
    a @ a
    return 2e-9 * size**3 / statistics.median(_measure.timed(lambda: a @ a)[0] for _ in range(calls))


def memory(p: Prepared, calls: int) -> Facts:
    peaks = [measured(p, _measure.peak_bytes) for _ in range(calls)]
    return {"peak_bytes": int(statistics.median(peaks)), "all_peak_bytes": peaks}


def measured(p: Prepared, meter: Callable[[Callable[[], object]], Any]) -> Any:
    p.reset()
    return meter(p.call)


def ordinary(w: Workload, calls: int) -> Facts:
    """Seconds of one ordinary training step: the loss's gradient and the optimizer of torch.optim.

    As many steps as the workload has are timed together: a single short one would mostly wake threads.
    """
    params = [p.detach().clone().requires_grad_() for p in w.start(w.meta)]
    opt = w.optimizer.ordinary(params)

    def train() -> None:
        for batch in w.batches:
            opt.zero_grad()
            for p, g in zip(params, torch.autograd.grad(w.loss(params, w.meta, batch), params), strict=True):
                p.grad = g
            opt.step()

    train()
    return {"ordinary_step_seconds": statistics.median(_measure.timed(train)[0] for _ in range(calls)) / w.steps}


def measure(w: Workload, variant: str, calls: int, what: list[str], folder: Path, backend: str) -> Facts:
    """What was measured of one variant, or why it could not be."""
    point: Facts = {"variant": variant}
    try:
        began = time.perf_counter()
        p = _variants.prepare(variant, w, backend)
        p.reset()
        found = p.call()  # traces, compiles, fills caches
    except Skipped as e:
        return point | {"skipped": str(e)}
    point["first_call_seconds"] = time.perf_counter() - began
    np.save(folder / f"{variant.replace(':', '-')}.npy", p.gradient(found))
    del found
    for meter in what:
        point |= {"seconds": seconds, "memory": memory}[meter](p, calls)
    return point | p.facts()


def main(args: argparse.Namespace) -> None:
    what = args.what.split(",")
    if "memory" in what:
        _measure.return_memory()
    w = _workloads.build(args.workload, args.quick, torch.float64 if "reference" in what else torch.float32)
    if "reference" in what:
        np.save(args.folder / "reference.npy", of_tensors(eager.plain(w)))
        points = [{"variant": "reference"}]
    elif "ordinary" in what or "curve" in what:
        points = [{"variant": args.what} | ordinary(w, 3 if args.quick else 9)]
        if "curve" in what:
            from _variants import mlc_way

            points[0] |= mlc_way.curve(w, args.backend)
    else:
        variants = args.variants.split(",")
        points = [measure(w, v, args.calls, what, args.folder, args.backend) for v in variants]
    for point in points:
        point |= {"workload": w.name, "shape": w.shape, "machine": _measure.machine()}
    print(json.dumps({"points": points}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("workload", str), ("variants", str), ("calls", int), ("what", str), ("folder", Path)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--backend", default="auto")
    main(parser.parse_args())
