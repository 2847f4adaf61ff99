"""Processes that run one program together agree on what they run: the same program, the same plan, the same turn.

A compiled call does not compare its collectives one by one.  Instead, before a program runs for the first time, its
sequence of collectives is compared across its circle of processes, and its plan is made by the first of them.  Before
every later call they agree on which recording they use, or all record anew; after its forward stage, on whether its
guards held everywhere.  So no process runs another sequence of collectives than its neighbours, and none decides alone.

These words go over a process group of its own (gloo), on which nothing of the user's is ever sent.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlc.errors import CommunicationError
from mlc.ir.communication.sequence import fingerprint

__all__ = ["Circle", "circle_of", "ended", "patience", "same_sequence"]

_GROUPS: dict[tuple[int, ...], Any] = {}
_PLACES: dict[int, tuple[str, int]] = {}  # machine and number of the process of each rank that this one has met
_GRACE = 2.0  # seconds that a process needs to end, after its connections have closed


def patience() -> float:
    """Seconds that a process waits for the others (``MLC_TIMEOUT``)."""
    return float(os.environ.get("MLC_TIMEOUT") or 600.0)


def circle_of(ranks: Sequence[int]) -> Circle | None:
    """The circle of these ranks; None where it is one process or there is nothing to agree on."""
    return Circle(tuple(ranks)) if len(ranks) > 1 else None


class Circle:
    """Processes that run a program together.

    Args:
        ranks: Their ranks in the world.
    """

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        group = _GROUPS.get(ranks)
        if group is None or group not in dist.distributed_c10d._world.pg_map:
            group = _GROUPS[ranks] = dist.new_group(
                list(ranks), timeout=timedelta(seconds=patience()), backend="gloo", use_local_synchronization=True
            )
            self._group = group
            self._meet()
        self._group = group

    def _meet(self) -> None:
        """Tell each other where the processes are, to name one that has ended."""
        said = self.told(json.dumps([socket.gethostname(), os.getpid()]))
        _PLACES.update({r: tuple(json.loads(t)) for r, t in zip(self.ranks, said, strict=True)})

    @property
    def first(self) -> bool:
        """Whether this process decides."""
        return int(dist.get_rank()) == self.ranks[0]

    @property
    def stands(self) -> bool:
        """Whether its group is still there."""
        return bool(dist.is_initialized() and self._group in dist.distributed_c10d._world.pg_map)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return int(self._reduced(torch.tensor([int(flag)]), dist.ReduceOp.MAX)[0]) == 1

    def all(self, flag: bool) -> bool:
        """Whether it is so on every process."""
        return not self.any(not flag)

    def alike(self, value: int) -> bool:
        """Whether a number (63 bits) is the same on every process."""
        low = self._reduced(torch.tensor([value, -value]), dist.ReduceOp.MAX).tolist()
        return bool(low[0] == value and low[1] == -value)

    def sum(self, value: float) -> float:
        """The sum of a number over processes."""
        return float(self._reduced(torch.tensor([value], dtype=torch.float64), dist.ReduceOp.SUM)[0])

    def told(self, text: str) -> list[str]:
        """A text of every process, in the order of ranks."""
        raw = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.ranks]
        self._do(lambda: dist.all_gather(sizes, torch.tensor([raw.numel()]), group=self._group))
        most = max(1, *map(int, sizes))
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: raw.numel()] = raw
        parts = [torch.zeros(most, dtype=torch.uint8) for _ in self.ranks]
        self._do(lambda: dist.all_gather(parts, padded, group=self._group))
        return [bytes(p[: int(n)].tolist()).decode() for p, n in zip(parts, sizes, strict=True)]

    def shared(self, text: str) -> str:
        """The text of the first process."""
        return self.told(text if self.first else "")[0]

    def _reduced(self, t: Tensor, op: Any) -> Tensor:
        self._do(lambda: dist.all_reduce(t, op=op, group=self._group))
        return t

    def _do(self, f: Any) -> None:
        try:
            f()
        except RuntimeError as e:
            raise CommunicationError(
                f"rank {dist.get_rank()} waited for the other processes of a compiled function{ended(self.ranks)}: "
                f"{str(e).strip().splitlines()[0]}",
                advice="every process has to call it alike; look at the others' first errors (MLC_TIMEOUT: seconds "
                "to wait)",
            ) from e  # fmt: skip


def ended(ranks: Sequence[int]) -> str:
    """Which processes have ended, as a part of a sentence; those on other machines cannot be asked."""
    mine = dist.get_rank()
    here = [r for r in ranks if r != mine and _PLACES.get(r, ("",))[0] == socket.gethostname()]
    until = time.monotonic() + _GRACE
    while True:
        gone = [r for r in here if not _alive(_PLACES[r][1])]
        if gone or time.monotonic() > until or not here:
            break
        time.sleep(0.05)
    if gone:
        return ", and " + ", ".join(f"rank {r} (process {_PLACES[r][1]})" for r in gone) + " has ended"
    others = ", ".join(f"rank {r}" for r in ranks if r != mine)
    return f" ({others})"


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs (one that has ended and that nobody has asked for does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return True


def same_sequence(circle: Circle, said: Sequence[tuple[str, Any]], of: str, loc: Any) -> None:
    """Compare what the processes of a circle are going to communicate.

    Args:
        circle: The processes.
        said: From :func:`mlc.ir.communication.sequence.sequence`.
        of: What it is the sequence of.
        loc: The user's function, where no line of it is to blame.

    Raises:
        CommunicationError: on every process, naming the first place where two of them differ.
    """
    mine = [text for text, _ in said]
    if circle.alike(fingerprint(mine)):
        return
    every = [t.split("\n") if t else [] for t in circle.told("\n".join(mine))]
    here = every[circle.ranks.index(dist.get_rank())]
    rank, other = next((r, o) for r, o in zip(circle.ranks, every, strict=True) if o != here)
    at = next((i for i, (a, b) in enumerate(zip(here, other, strict=False)) if a != b), min(len(here), len(other)))
    ends = "nothing more"
    loc = said[at][1] if at < len(said) else said[-1][1] if said else loc
    raise CommunicationError(
        f"processes have different programs: the {of} runs {len(mine)} collectives here and {len(other)} on rank "
        f"{rank}; number {at} is {here[at] if at < len(here) else ends} here and "
        f"{other[at] if at < len(other) else ends} there", loc=loc,
        advice="use the results of collectives alike on every process: return them everywhere, or nowhere",
    )  # fmt: skip
