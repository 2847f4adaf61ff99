"""Running the suite: which faults the tests notice, remembered for as long as neither code nor tests change."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.mutation.fault import ROOT, Fault
from tests.mutation.planting import tried

__all__ = ["KEPT", "LEAST", "Unsound", "Verdict", "judge", "judged", "report", "score", "sound"]

LEAST = 0.95  # of all faults must be killed
LIMIT = 600.0  # seconds for one fault; a fault that makes the tests run forever is noticed
KEPT = ROOT / "build" / "mutation.json"
_SOUND = ""  # there: marks of the tests that pass without a fault


class Unsound(Exception):
    """The tests fail without any fault, so that they say nothing."""


@dataclass(frozen=True)
class Verdict:
    """What became of one fault.

    Attributes:
        kind: ``"killed"``, ``"survived"``, or ``"broken"`` where nothing can be said: the fault was not planted, or
            the tests did not run.
        by: The test that failed first.
        seconds: Of the whole process, imports included.
    """

    kind: str
    by: str
    seconds: float


def judge(fault: Fault) -> Verdict:
    """Plant one fault in a process of its own and run its tests there."""
    started = time.perf_counter()
    found = _apart(fault, fault.tests)
    seconds = round(time.perf_counter() - started, 1)
    if found is None:
        return Verdict("killed", f"nothing came back within {LIMIT:g} s", seconds)
    if not found.get("planted") or found["status"] not in (0, 1) or not found["ran"]:
        return Verdict("broken", str(found), seconds)
    return Verdict("killed" if found["status"] == 1 else "survived", str(found["by"]), seconds)


# What every test imports before it comes to mlc: a server imports it once and is forked for every fault.
_BEFORE = ["torch", "torch._decomp", "torch.utils.flop_counter", "scipy.sparse.csgraph", "networkx", "sympy", "pydantic",
           "lark", "rich", "pytest"]  # fmt: skip


@cache
def _processes() -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_BEFORE)
    return context


def _apart(fault: Fault | None, tests: Sequence[str]) -> dict[str, Any] | None:
    """What happened in a process of its own; None when it did not end in time."""
    context = _processes()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        process = context.Process(target=_child, args=(fault, tuple(tests), str(out)))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
            return None
        said = out.with_suffix(".json")
        if said.exists():
            return dict(json.loads(said.read_text()))
        text = out.read_text(errors="replace")[-2000:] if out.exists() else ""
        return {"status": process.exitcode, "ran": 0, "by": "", "planted": False, "output": text}


def _child(fault: Fault | None, tests: tuple[str, ...], out: str) -> None:
    os.chdir(ROOT)
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    file = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    found = tried(fault, tests)
    Path(out).with_suffix(".json").write_text(json.dumps(found))


def sound(faults: Iterable[Fault], kept: dict[str, Any]) -> None:
    """Run all tests of some faults without any fault; those that are known to pass are not run again.

    Raises:
        Unsound: where one fails.
    """
    known = kept.setdefault(_SOUND, {})
    marks = {t: _mark([t]) for f in faults for t in f.tests}
    tests = sorted(t for t, m in marks.items() if known.get(t) != m)
    found = _apart(None, tests) if tests else {"status": 0}
    if found is None or found["status"] != 0:
        raise Unsound(f"without a fault: {found}")
    known.update(marks)


def judged(faults: Mapping[str, Fault], processes: int, say: Callable[[str], None] = print) -> dict[str, Verdict]:
    """Verdicts of all faults; those that are known and still hold are not judged again.

    Raises:
        Unsound: where the tests fail without a fault.
    """
    kept = {} if not KEPT.exists() else json.loads(KEPT.read_text())
    marks = {name: _mark(f.tests, repr(f)) for name, f in faults.items()}
    known = {n: Verdict(*row[1:]) for n, row in kept.items() if n in faults and row[0] == marks[n]}
    todo = [f for n, f in faults.items() if n not in known or known[n].kind == "broken"]
    sound(todo, kept)
    with ThreadPoolExecutor(processes) as pool:
        running = {pool.submit(judge, f): f.name for f in todo}
        for done in as_completed(running):
            name = running[done]
            known[name] = done.result()
            say(f"{len(known):3d}/{len(faults)} {name}: {known[name].kind} ({known[name].seconds:.0f} s)")
            kept.update((n, [marks[n], *asdict(v).values()]) for n, v in known.items())
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=1))
    return {n: known[n] for n in faults}


@cache
def _text(path: Path) -> bytes:
    return path.read_bytes()


@cache
def _shared() -> bytes:
    """All of mlc, and what tests share."""
    helpers = (
        p for p in (ROOT / "tests").rglob("*.py") if not p.name.startswith("test_") and "mutation" not in p.parts
    )
    files = sorted([*(ROOT / "mlc").rglob("*.py"), *helpers])
    return hashlib.sha256(b"\0".join(_text(p) for p in files)).digest()


def _mark(tests: Iterable[str], fault: str = "") -> str:
    """A hash of everything that a verdict depends on: mlc, the fault, its tests and their helpers."""
    texts = [t.encode() + b"\0" + _text(ROOT / t.split("::")[0]) for t in tests]
    return hashlib.sha256(b"\0".join([_shared(), fault.encode(), *texts])).hexdigest()


def score(verdicts: Mapping[str, Verdict]) -> float:
    """The part of the faults that is killed."""
    return sum(v.kind == "killed" for v in verdicts.values()) / max(len(verdicts), 1)


def report(verdicts: Mapping[str, Verdict]) -> str:
    """A table, what survived first, and the score."""
    width = max(map(len, verdicts), default=0)
    order = sorted(verdicts.items(), key=lambda x: (x[1].kind == "killed", x[0]))
    rows = [f"{n:{width}}  {v.kind:8}  {v.seconds:4.0f} s  {v.by}" for n, v in order]
    killed = sum(v.kind == "killed" for v in verdicts.values())
    return "\n".join([*rows, f"mutation score: {killed} of {len(verdicts)} faults killed ({score(verdicts):.1%})"])
