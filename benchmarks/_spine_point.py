"""One point of spine.py: ``_spine_point.py mlc|plain STEPS CALLS W1|SMALL seconds|memory GRADIENT_FILE``."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import _measure
import _w1
import numpy as np
import torch

import mlc


def seconds(call: Callable[[], object], calls: int) -> dict[str, Any]:
    wall, cpu = zip(*(_measure.timed(call) for _ in range(calls)), strict=True)
    return {
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "all_seconds": wall,
        "all_cpu_seconds": cpu,
    }


def memory(call: Callable[[], object], calls: int) -> dict[str, Any]:
    peaks = [_measure.peak_bytes(call) for _ in range(calls)]
    return {"peak_bytes": int(statistics.median(peaks)), "all_peak_bytes": peaks}


def main(method: str, steps: int, calls: int, shape: _w1.Shape, what: str, gradient_file: str) -> None:
    if what == "memory":
        _measure.return_memory()
    model, batches, validation = _w1.problem(shape, steps, _measure.DEVICE)
    params = list(model.parameters())
    compiled = mlc.compile(_w1.ordinary)
    loop = compiled if method == "mlc" else _w1.unrolled

    def call() -> None:
        loop(model, batches, validation).backward()

    def from_nothing() -> None:
        """Without the hypergradient of the last call; freed outside of what is measured by a later gc."""
        call()
        model.zero_grad(set_to_none=True)

    began = time.perf_counter()
    call()  # traces, fills caches
    first = time.perf_counter() - began
    np.save(gradient_file, torch.cat([p.grad.flatten() for p in params]).double().cpu().numpy())
    model.zero_grad(set_to_none=True)
    measured = seconds(from_nothing, calls) if what == "seconds" else memory(from_nothing, calls)
    point = {
        "method": method,
        "steps": steps,
        **measured,
        "first_call_seconds": first,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in params),
        "shape": asdict(shape),
        "machine": _measure.machine(),
    }
    if method == "mlc":
        point |= {"reported_peak_bytes": compiled.report.peak_bytes, "stages": compiled.report.stages}
        point |= {"planned_peak_bytes": compiled.plan.peak_bytes}
    print(json.dumps(point))


if __name__ == "__main__":
    method, steps, calls, shape, what, gradient_file = sys.argv[1:]
    main(method, int(steps), int(calls), getattr(_w1, shape), what, gradient_file)
