"""Random kills: a multilevel training is SIGKILLed again and again, and must end as if nothing had happened.

    python -m tests.kills -n 200 [--ranks 2] [--output kills.json]

Children are forked from this process, which has imported and compiled everything that they need.  Some are killed after
a random time, others the moment a checkpoint is being written.  A killed training is started again until it is done;
then parameters of every level, and all else that it leaves, must be those of an uninterrupted one bit for bit.  Every
start must go on from the newest file in the folder, and that one may be no more than one write behind.  With ``--ranks
2`` two processes train together over gloo, and one of them is killed: the other one has to end by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import mlc
from mlc.training.state.checkpoints import Checkpoints, Place
from tests.training import restart

__all__ = ["Kills"]

EVERY = 2
STEPS = restart.STEPS


def together(rank: int) -> tuple[mlc.Training, dict[str, Tensor]]:
    """Two inner problems, one on each rank, under one outer one whose hypergradient is their mean."""
    generator = torch.Generator().manual_seed(rank)
    w, u = (nn.Parameter(torch.full((3,), v, dtype=torch.float64)) for v in (0.5, 0.1))

    def batches() -> Any:
        for _ in range(5):
            yield torch.randn(4, 3, generator=generator, dtype=torch.float64)

    inner = mlc.Level(
        "inner", w, torch.optim.SGD([w], lr=0.1, momentum=0.9), lambda b: (b @ (w - u)).square().mean(), batches, 2
    )
    outer = mlc.Level("outer", u, torch.optim.Adam([u], lr=0.1, eps=1e-3), lambda: (w - 1 - rank).square().sum())
    return mlc.Training([inner, outer], mesh=DeviceMesh("cpu", [0, 1])), {"w": w, "u": u}


def child(folder: Path, rank: int, ranks: int, attempt: int) -> None:
    """One start of the training; what it comes to is written beside the checkpoints."""
    os.setpgrp()
    warnings.simplefilter("ignore")
    if ranks > 1:
        os.environ["MLC_TIMEOUT"] = "20"
        store = dist.FileStore(str(folder.parent / f"store-{attempt}"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    log = os.open(folder.parent / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: mlc.training.Event) -> None:
        if event.kind in ("start", "step"):
            os.write(log, f"{event.kind} {event.step}\n".encode())

    training, tensors = restart.build() if ranks == 1 else together(rank)
    training.callbacks.append(note)
    training.run(STEPS, checkpoint=folder, every=EVERY)
    (folder.parent / f"result-{rank}").write_text(hashed(training, tensors))


def hashed(training: mlc.Training, tensors: dict[str, Tensor]) -> str:
    """Every tensor by name, and the state of every level, as hashes."""
    named = {k: v for k, v in tensors.items()}
    named |= {f"{x.name}[{i}]": p for x in training.levels for i, p in enumerate(x.params)}
    for x in training.levels:
        for i, p in enumerate(x.params):
            held = x.optimizer.state.get(p, {})
            named |= {f"{x.name}[{i}].{k}": v for k, v in held.items() if isinstance(v, Tensor)}
    found = {k: hashlib.sha256(v.detach().numpy().tobytes()).hexdigest()[:16] for k, v in named.items()}
    return json.dumps({**found, "positions": [repr(x.feed) for x in training.levels]}, sort_keys=True)


def forked(folder: Path, rank: int, ranks: int, attempt: int) -> int:
    """A child's number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sys.stderr = open(folder.parent / f"errors-{rank}", "a")  # noqa: SIM115 (the process's own)
        child(folder, rank, ranks, attempt)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Kills:
    """Trainings that are killed until enough kills have been made."""

    def __init__(self, ranks: int = 1, seed: int | None = None) -> None:
        torch.set_num_threads(1)
        self.ranks = ranks
        self.seed = random.SystemRandom().randrange(2**31) if seed is None else seed
        self.random = random.Random(self.seed)
        self.kills = self.while_writing = self.starts = self.trainings = self.most_lost = 0
        self.attempt = 0
        self.survivors = 0
        began = time.perf_counter()
        self.wanted = self._training(kill=0)[0]
        self.seconds = time.perf_counter() - began

    def go(self, n: int) -> dict[str, Any]:
        """Make so many kills.

        Raises:
            AssertionError: where a training does not end as the uninterrupted one, or loses more than it may.
        """
        began = time.perf_counter()
        while self.kills < n:
            found, _ = self._training(n - self.kills)
            assert found == self.wanted, f"seed {self.seed}: {found} instead of {self.wanted}"
        return {
            "kills": self.kills, "while a checkpoint was written": self.while_writing, "ranks": self.ranks,
            "trainings": self.trainings, "starts": self.starts, "steps of a training": STEPS, "every": EVERY,
            "most steps done again after a kill": self.most_lost, "survivors that ended by themselves": self.survivors,
            "identical": True, "processes left": 0, "seed": self.seed, "torch": torch.__version__,
            "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip

    def _training(self, kill: int) -> tuple[list[str], int]:
        """One training, killed up to so many times; its results, and how often."""
        self.trainings += 1
        root = Path(tempfile.mkdtemp(prefix="kills-"))
        folder = root / "run"
        folder.mkdir()
        made = 0
        try:
            while not self._start(folder, made < kill):
                made += 1
            return [(root / f"result-{r}").read_text() for r in range(self.ranks)], made
        finally:
            shutil.rmtree(root)

    def _start(self, folder: Path, kill: bool) -> bool:
        """Start it, and kill it or let it end; whether it ended."""
        self.starts += 1
        self.attempt += 1
        before = [_steps(folder, r, self.ranks) for r in range(self.ranks)]
        pids = [forked(folder, r, self.ranks, self.attempt) for r in range(self.ranks)]
        victim = self.random.randrange(self.ranks)
        killed = kill and self._kill(pids[victim], folder)
        codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
        for p in pids:  # nothing that it may have started is left
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p, 0)
                raise AssertionError(f"process group {p} is still there")
        self._check_log(folder, before)
        if not killed or codes[victim] != -signal.SIGKILL:  # it was done before
            errors = [(folder.parent / f"errors-{r}").read_text() for r in range(self.ranks)]
            assert codes == [0] * self.ranks, (codes, "".join(errors))
            return True
        self.kills += 1
        self.while_writing += any(f.name.endswith(".new") for f in folder.iterdir())
        self.survivors += sum(c != -signal.SIGKILL for c in codes)
        return False

    def _kill(self, pid: int, folder: Path) -> bool:
        """Kill it after some time, or as soon as it writes."""
        end = time.perf_counter() + self.random.uniform(0, 1.1) * self.seconds if hasattr(self, "seconds") else 0
        writing = self.random.random() < 0.5
        while time.perf_counter() < end or writing:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            if writing and time.perf_counter() > end and any(f.name.endswith(".new") for f in os.scandir(folder)):
                break
            time.sleep(0 if writing else 0.001)
        os.kill(pid, signal.SIGKILL)
        return True

    def _check_log(self, folder: Path, before: list[set[int]]) -> None:
        """The start went on from the newest step that every rank had a file of; no more than a write was lost."""
        both = set.intersection(*before)
        for rank in range(self.ranks):
            path = folder.parent / f"log-{rank}"
            lines = [x.split() for x in path.read_text().splitlines()] if path.exists() else []
            at = [i for i, (kind, _) in enumerate(lines) if kind == "start"]
            if not at or (len(at) > 1 and at[-1] == 0):
                continue
            marks = folder.parent / f"seen-{rank}"
            if marks.exists() and int(marks.read_text()) == len(at):
                continue  # it was killed before it began
            marks.write_text(str(len(at)))
            begun = int(lines[at[-1]][1])
            assert begun == max(both, default=0), (begun, both)
            done = max((int(s) for kind, s in lines[: at[-1]] if kind == "step"), default=0)
            lost = done - begun
            assert lost < 2 * EVERY + 1, (done, begun)
            self.most_lost = max(self.most_lost, lost)


def _steps(folder: Path, rank: int, ranks: int) -> set[int]:
    return {k for k, _ in Checkpoints(folder, Place(rank, ranks)).files()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-n", type=int, default=200, help="how many kills")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warm()
    found = Kills(args.ranks, args.seed).go(args.n)
    print(json.dumps(found, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


def warm() -> None:
    """What the first call of a process costs is paid before children are forked."""
    torch.set_num_threads(1)
    restart.build()[0].run(1)


if __name__ == "__main__":
    main()
