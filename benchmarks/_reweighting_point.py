"""Points of digits_reweighting.py: ``_reweighting_point.py STEPS WHAT CALLS FOLDER WAY... [--quick]``.

WHAT is ``seconds``: all ways in this process, taking turns, so that a machine that slows down slows all of them; or
``memory``: malloc returns memory at once, so name one way. A way is ``hand``, ``hand64`` (float64), ``betty:TYPE``,
``levels``, or ``mlc:BUDGET:BACKEND``. The first hypergradient of each is left in FOLDER.
"""

import argparse
import json
import statistics
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _measure
import _reweighting
import numpy as np
import torch
from _reweighting import Problem, Shape, Way

WARM = 8  # calls before anything is measured: traces, plans, caches, trials of compiled segments


def made(way: str, shape: Shape, steps: int) -> Way:
    kind, _, rest = way.partition(":")
    p = Problem(shape, torch.float64 if kind == "hand64" else torch.float32)
    if kind == "betty":
        import _betty

        return _betty.reweighting(p, steps, type=rest)
    if kind == "mlc":
        memory, _, backend = rest.partition(":")
        budget = None if memory == "none" else int(memory) if memory.isdigit() else memory
        return _reweighting.compiled(p, steps, budget, backend)
    return {"hand": _reweighting.by_hand, "hand64": _reweighting.by_hand, "levels": _reweighting.levels}[kind](p, steps)


def first(way: str, shape: Shape, steps: int, folder: Path) -> tuple[Way, dict[str, Any]]:
    """A way that is warm, and what its first step cost; leaves the first hypergradient."""
    began, seen = time.perf_counter(), []
    w = made(way, shape, steps)

    def keep(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).clone())

    hook = w.optimizer.register_step_pre_hook(keep)
    w.advance()
    hook.remove()
    np.save(folder / f"{way.replace(':', '-')}.npy", seen[0].double().numpy())
    took = time.perf_counter() - began
    for _ in range(WARM):
        w.advance()
    return w, {"way": way, "inner_steps": steps, "first_seconds": took}


def in_turns(ways: list[Way], calls: int) -> list[dict[str, Any]]:
    """Median seconds of each way."""
    found: list[list[tuple[float, float]]] = [[] for _ in ways]
    for _ in range(calls):
        for w, times in zip(ways, found, strict=True):
            times.append(_measure.timed(w.advance))
    return [
        {
            "seconds": statistics.median(t[0] for t in times),
            "cpu_seconds": statistics.median(t[1] for t in times),
            "all_cpu_seconds": [t[1] for t in times],
        }
        for times in found
    ]


def peaks(w: Way, calls: int) -> dict[str, Any]:
    found = [_measure.peak_bytes(w.advance) for _ in range(calls)]
    return {"peak_bytes": int(statistics.median(found)), "all_peak_bytes": found}


def main(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    if args.what == "memory":
        _measure.return_memory()
    shape = _reweighting.SMALL if args.quick else _reweighting.FULL
    ways, points = zip(*(first(w, shape, args.steps, args.folder) for w in args.ways), strict=True)
    measured = in_turns(list(ways), args.calls) if args.what == "seconds" else [peaks(w, args.calls) for w in ways]
    shared = {"shape": asdict(shape), "machine": _measure.machine()}
    found = [p | m | w.facts() | shared for p, m, w in zip(points, measured, ways, strict=True)]
    print(json.dumps({"points": found}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=int)
    parser.add_argument("what", choices=["seconds", "memory"])
    parser.add_argument("calls", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ways", nargs="+")
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args())
