"""One point of spine.py: ``_spine_point.py mlc|plain STEPS CALLS W1|SMALL WHAT GRADIENT_FILE``.

WHAT is ``seconds``, ``memory`` or ``seconds,memory``; seconds are slow where memory is measured too.
"""

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

Meter = Callable[[Callable[[], object], int], dict[str, Any]]


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


def main(method: str, steps: int, calls: int, shape: _w1.Shape, what: list[Meter], gradient_file: str) -> None:
    if memory in what:
        _measure.return_memory()
    model, batches, validation = _w1.problem(shape, steps, _measure.DEVICE)
    params = list(model.parameters())
    compiled = mlc.compile(_w1.ordinary, memory="min")
    loop = compiled if method == "mlc" else _w1.unrolled

    def call() -> None:
        loop(model, batches, validation).backward()

    def from_nothing() -> None:
        """A call that leaves nothing behind, so that each one allocates its hypergradient."""
        call()
        model.zero_grad(set_to_none=True)

    began = time.perf_counter()
    call()  # traces, fills caches
    first = time.perf_counter() - began
    np.save(gradient_file, torch.cat([p.grad.flatten() for p in params]).double().cpu().numpy())
    model.zero_grad(set_to_none=True)
    point = {
        "method": method,
        "steps": steps,
        "first_call_seconds": first,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in params),
        "shape": asdict(shape),
        "machine": _measure.machine(),
    }
    for meter in what:
        point |= meter(from_nothing, calls)
    if method == "mlc":
        point |= {"reported_peak_bytes": compiled.report.peak_bytes, "stages": compiled.report.stages}
        point |= {"planned_peak_bytes": compiled.plan.peak_bytes}
    print(json.dumps(point))


if __name__ == "__main__":
    method, steps, calls, shape, what, gradient_file = sys.argv[1:]
    meters = [{"seconds": seconds, "memory": memory}[each] for each in what.split(",")]
    main(method, int(steps), int(calls), getattr(_w1, shape), meters, gradient_file)
