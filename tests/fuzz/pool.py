"""Programs judged in worker processes with a time limit each: a worker that hangs is replaced, a result is a line.

The limit is of the processor's time, so that a verdict does not depend on what else the machine does; a worker that
rests is given ten times as much of the clock's.

`resume` skips what is in the file already, so that a long run can be stopped at any moment and continued.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import queue
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.verdict import Verdict

PATIENCE = 10  # seconds of the clock for each that a program may compute


def work(todo: Any, done: Any, thorough: int, folder: Path, limit: float) -> None:
    """A worker: judge until told to stop, or until a program takes too long; every `thorough`th by all oracles."""
    import torch

    from tests.fuzz.generate import spec_of
    from tests.fuzz.judge import judged

    torch.set_num_threads(1)
    while (seed := todo.get()) is not None:
        signal.setitimer(signal.ITIMER_PROF, limit)  # ends the process
        done.put(judged(spec_of(seed), folder=folder, depth=int(bool(thorough) and seed % thorough == 0)))


@dataclass
class Worker:
    """A process and its two queues."""

    process: Any
    todo: Any
    done: Any
    seed: int | None = None
    since: float = 0.0


def started(context: Any, thorough: int, folder: Path, limit: float) -> Worker:
    todo, done = context.Queue(), context.Queue()
    process = context.Process(target=work, args=(todo, done, thorough, folder, limit), daemon=True)
    process.start()
    return Worker(process, todo, done)


def stopped(worker: Worker) -> None:
    worker.process.kill()
    worker.process.join()


def run(
    seeds: list[int], *, processes: int = 2, limit: float = 60.0, thorough: int = 10, folder: Path
) -> Iterator[Verdict]:
    """Verdicts as they come.

    Args:
        seeds: Which programs.
        processes: Workers, at most two.
        limit: Seconds of the processor for one program; more is "slow".
        thorough: Every how many programs all oracles are asked; 0: never.
        folder: Where the files of the programs go.
    """
    context = mp.get_context("spawn")
    waiting = list(reversed(seeds))
    workers = [started(context, thorough, folder, limit) for _ in range(min(processes, 2, len(seeds)))]
    try:
        while waiting or any(w.seed is not None for w in workers):
            for i, w in enumerate(workers):
                if w.seed is None and waiting:
                    w.seed, w.since = waiting.pop(), time.monotonic()
                    w.todo.put(w.seed)
                found = poll(w, limit)
                if found is None:
                    continue
                w.seed = None
                if found.kind == "slow" or not w.process.is_alive():
                    stopped(w)
                    workers[i] = started(context, thorough, folder, limit)
                yield found
    finally:
        for w in workers:
            stopped(w)


def poll(w: Worker, limit: float) -> Verdict | None:
    """A worker's verdict, if it has one or has had its time."""
    from tests.fuzz.generate import spec_of

    if w.seed is None:
        return None
    try:
        return w.done.get(timeout=0.05)  # type: ignore[no-any-return]
    except queue.Empty:
        pass
    took = time.monotonic() - w.since
    ended = not w.process.is_alive()
    if took > PATIENCE * limit or (ended and w.process.exitcode == -signal.SIGPROF):
        return Verdict(w.seed, "slow", "time", f"more than {limit:.0f} s", seconds=took, spec=spec_of(w.seed).dump())
    if ended:
        return Verdict(
            w.seed,
            "raw",
            "process",
            f"the process ended with {w.process.exitcode}",
            seconds=took,
            spec=spec_of(w.seed).dump(),
        )
    return None


def read(path: Path) -> list[Verdict]:
    """Verdicts of a file of JSON lines; a last line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(Verdict(**json.loads(line)))
        except json.JSONDecodeError:
            continue
    return found
