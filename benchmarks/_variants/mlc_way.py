"""mlc through its public interface: the workload's loop as it is, compiled for a budget."""

import time
from typing import Any

import torch
from _workloads.workload import Workload

import mlc
from _variants.prepared import Prepared, Skipped, of_tensors


def parsed(memory: str) -> int | str | None:
    return None if memory == "none" else memory if memory == "min" else int(memory)


def compiled(w: Workload, memory: str, backend: str) -> Prepared:
    """``memory``: ``none``, ``min`` or bytes."""
    loop = mlc.compile(w.fn, memory=parsed(memory), backend=backend)
    w.reset()
    began = time.perf_counter()
    try:
        loop(*w.args)
    except mlc.BudgetError as e:
        raise Skipped(str(e).splitlines()[0]) from None
    first = time.perf_counter() - began

    def call() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = loop(*w.args)
        return loss, list(torch.autograd.grad(loss, w.meta))

    def facts() -> dict[str, Any]:
        return {
            "budget": parsed(memory),
            "first_forward_seconds": first,
            "planned_peak_bytes": loop.plan.peak_bytes,
            "planned_seconds": loop.plan.seconds,
            "reported_peak_bytes": loop.report.peak_bytes,
            "stages": loop.report.stages,
        }

    return Prepared(call, of_tensors, w.reset, facts)


def curve(w: Workload, backend: str) -> dict[str, int]:
    """Predicted peaks at the two ends of the curve, bytes."""
    program = mlc.trace(w.fn, *w.args)
    return {
        "min_peak_bytes": mlc.plan(program, memory="min", backend=backend).peak_bytes,
        "none_peak_bytes": mlc.plan(program, backend=backend).peak_bytes,
    }
