"""One point of tracing.py: ``_tracing_point.py STEPS SIX_LAYERS|SMALL``."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import _measure
import _w1

import mlc
from mlc.ir.core import Loop, Region
from mlc.runtime.call import Executor
from mlc.view.plan import stages_for


def equations(region: Region | None) -> int:
    """Equations of a region and of the loop bodies in it."""
    if region is None:
        return 0
    return sum(1 + (equations(e.op.body) if isinstance(e.op, Loop) else 0) for e in region.eqns)


def main(steps: int, shape: _w1.Shape) -> None:
    model, batches, validation = _w1.problem(shape, steps, _measure.DEVICE)
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - wall
        cpu_seconds[name] = time.process_time() - cpu

    with stage("trace"):
        program = mlc.trace(_w1.ordinary, model, batches, validation)
    with stage("plan"):
        plan = mlc.plan(program)
    with stage("lower"):
        stages = stages_for(program, plan)
    with stage("generate"):
        Executor(stages)
    point = {
        "steps": steps,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "total_seconds": sum(seconds.values()),
        "total_cpu_seconds": sum(cpu_seconds.values()),
        "equations": {"forward": equations(stages.forward), "backward": equations(stages.backward)},
        "shape": asdict(shape),
        "machine": _measure.machine(),
    }
    print(json.dumps(point))


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(_w1, sys.argv[2]))
