"""Several gloo processes on this machine for one test: forked from a server that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import mlc

__all__ = ["Left", "World", "alike", "run"]


class Left(Exception):
    """What a process was left by: the type of its error, and the text."""

    def __init__(self, kind: str, text: str, trace: str = "") -> None:
        super().__init__(kind, text, trace)
        self.kind, self.text, self.trace = kind, text, trace

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}\n{self.trace}"


class World:
    """The store of a job, kept by the process that starts it."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.store.port)


def _child(
    rank: int, n: int, port: int, function: Callable[..., Any], args: Any, env: dict[str, str], pipe: Any
) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(rank)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.distributed.nn.functional is deprecated
    warnings.filterwarnings("ignore", message=".*autograd kernel was not registered.*")
    try:
        store = dist.TCPStore("127.0.0.1", port, None, False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
        found = function(rank, n, *args)
        pipe.send((True, found))
    except mlc.MlcError as e:
        pipe.send((False, (type(e).__name__, str(e), "")))
    except BaseException as e:
        pipe.send((False, (type(e).__name__, str(e), traceback.format_exc())))
    pipe.close()
    os._exit(0)


def run(n: int, function: Callable[..., Any], *args: Any, seconds: float = 90.0, **env: str) -> list[Any]:
    """``function(rank, n, *args)`` on n processes; what each returned, or a :class:`Left`.

    Raises:
        TimeoutError: when a process has not answered in so many seconds (all are killed then).
    """
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["tests.distributed.warmed"])
    world = World(n)
    ends, processes = [], []
    for rank in range(n):
        ours, theirs = ctx.Pipe()
        p = ctx.Process(target=_child, args=(rank, n, world.port, function, args, env, theirs), daemon=True)
        p.start()
        theirs.close()
        ends.append(ours)
        processes.append(p)
    out: list[Any] = []
    try:
        for rank, end in enumerate(ends):
            if not end.poll(seconds):
                raise TimeoutError(f"rank {rank} of {n} has not answered in {seconds} s")
            try:
                ok, value = end.recv()
            except EOFError:
                ok, value = False, ("died", "the process ended without a word", "")
            out.append(value if ok else Left(*value))
    finally:
        for p in processes:
            p.kill()
            p.join()
    return out


def alike(results: list[Any]) -> list[Any]:
    """The results, which none of the processes may have failed to give."""
    for r in results:
        if isinstance(r, Left):
            raise AssertionError(str(r))
    return results
