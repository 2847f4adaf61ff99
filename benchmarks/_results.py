"""Points, each measured in a process of its own, and the JSON file that a benchmark leaves."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

HERE = Path(__file__).parent
RESULTS = HERE / "results"


class PointFailed(SystemExit):
    """A point's process failed; the message ends with what it said. Not caught, it ends the benchmark."""


def run_point(script: str, *args: object, threads: int | None = None) -> dict[str, Any]:
    """What ``script`` measured in a fresh process: it prints one JSON object as its last line.

    Args:
        script: A file in this folder.
        *args: Its arguments.
        threads: Threads of each operation; None: as torch chooses.

    Raises:
        PointFailed: when the process did.
    """
    command = [sys.executable, str(HERE / script), *map(str, args)]
    env = os.environ if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr or done.stdout or f"exit status {done.returncode}"
        raise PointFailed(f"{script} {' '.join(map(str, args))} failed:\n{said}")
    return json.loads(done.stdout.splitlines()[-1])


def busy(console: Console) -> float:
    """Running processes (mean of the last minute) before we start; warn when they spoil what we measure.

    One process competing for a core can make threaded operations ten times as slow: their barriers spin.
    """
    load = os.getloadavg()[0]
    if load > 0.3:
        console.print(f"[bold]the machine is busy (load {load:.1f}): seconds below say little[/bold]")
    return load


def write(path: Path, load: float, points: list[dict[str, Any]], **content: Any) -> None:
    """Write a result file: what all points share (machine, shape) once, then the points and ``content``."""
    machine, shape = points[0]["machine"], points[0]["shape"]
    own = [{k: v for k, v in p.items() if k not in ("machine", "shape")} for p in points]
    head = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {**machine, "python": platform.python_version(), "load_before": load},
        "shape": shape,
        "points": own,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | content, indent=2) + "\n")
