"""Compiling many segments at once: worker processes that write artefacts, which the caller then reads.

Inductor compiles one graph at a time and waits for the C++ compiler in between; a process per core keeps all cores
busy.  A worker gets pickled segments on its standard input and answers with files
(:mod:`mlc.runtime.inductor.artefacts`); whatever it cannot do is simply not there afterwards, and the caller does it
itself and reports what is wrong.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from mlc.ir.core import Eqn, Region
from mlc.ir.types import TensorType
from mlc.runtime.inductor.artefacts import build, known

__all__ = ["compile_ahead"]

FEWEST = 6  # segments for which starting one more process (about 3 s) pays

Job = tuple[str, Region]


def compile_ahead(jobs: Sequence[Job]) -> None:
    """Put artefacts of the segments that have none on disk, as many at a time as there are cores.

    Args:
        jobs: Key and body of each segment.
    """
    missing = [(key, _portable(body)) for key, body in jobs if not known(key) and _on_cpu(body)]
    count = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
                len(missing) // FEWEST)  # fmt: skip
    if count < 2 or not sys.executable:
        return
    missing.sort(key=lambda job: -len(job[1]))  # the longest first: they end together
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for k in range(count):
            processes.append(_start(missing[k::count]))
        for p in processes:
            p.wait()
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.wait()


def _start(jobs: Sequence[Job]) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([p or os.getcwd() for p in sys.path])
    env = {**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", "from mlc.runtime.inductor.workers import work; work()"]
    p = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert p.stdin is not None
    with contextlib.suppress(BrokenPipeError), p.stdin as pipe:
        _Pickler(pipe).dump((torch.get_num_threads(), list(jobs)))
    return p


class _Pickler(pickle.Pickler):
    """Operators go by name."""

    def reducer_override(self, x: Any) -> Any:
        if isinstance(x, OpOverload):
            return _operator, (x.namespace, x._schema.name.split("::")[1], x._overloadname)
        return NotImplemented


def _operator(namespace: str, name: str, overload: str) -> OpOverload:
    op = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    assert isinstance(op, OpOverload)
    return op


def work() -> None:
    """What a worker process does."""
    threads, jobs = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    for key, body in jobs:
        with contextlib.suppress(Exception):
            build(key, body)


def _on_cpu(body: Region) -> bool:
    types = [v.type for v in (*body.inputs, *body.outputs)]
    return all(isinstance(t, TensorType) and t.device.type == "cpu" for t in types)


def _portable(body: Region) -> Region:
    """The segment without places in the user's code."""
    eqns = tuple(Eqn(e.op, e.args, e.outs, e.kwargs) for e in body.eqns)
    return Region(body.inputs, eqns, body.outputs)
