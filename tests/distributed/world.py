"""Several gloo processes on this machine for one test: forked from a server that has imported everything already."""

from __future__ import annotations

import importlib
import inspect
import io
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mlc

__all__ = ["Left", "alike", "run"]


class Left(Exception):
    """What a process was left by: the type of its error, and the text."""

    def __init__(self, kind: str, text: str, trace: str = "") -> None:
        super().__init__(kind, text, trace)
        self.kind, self.text, self.trace = kind, text, trace

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}\n{self.trace}"


def _child(rank: int, n: int, port: int, where: tuple[str, str], args: Any, env: dict[str, str], pipe: Any) -> None:
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
        found = (True, getattr(importlib.import_module(where[0]), where[1])(rank, n, *args))
    except mlc.MlcError as e:
        found = (False, (type(e).__name__, str(e), ""))
    except BaseException as e:
        found = (False, (type(e).__name__, str(e), traceback.format_exc()))
    data = io.BytesIO()
    torch.save(found, data)
    pipe.send_bytes(data.getvalue())
    pipe.close()
    os._exit(0)


def run(n: int, function: Callable[..., Any], *args: Any, seconds: float = 240.0, **env: str) -> list[Any]:
    """``function(rank, n, *args)``, of a module here, on n processes; what each returned, or a :class:`Left`.

    Raises:
        TimeoutError: when a process has not answered in so many seconds (all are killed then).
    """
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["tests.distributed.warmed"])
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    where = (f"tests.distributed.{Path(inspect.getfile(function)).stem}", function.__name__)
    ends, processes = [], []
    for rank in range(n):
        ours, theirs = ctx.Pipe(duplex=False)
        p = ctx.Process(target=_child, args=(rank, n, store.port, where, args, env, theirs), daemon=True)
        p.start()
        theirs.close()
        ends.append(ours)
        processes.append(p)
    try:
        return [_answer(end, rank, seconds) for rank, end in enumerate(ends)]
    finally:
        for p in processes:
            p.kill()
            p.join()


def _answer(end: Any, rank: int, seconds: float) -> Any:
    if not end.poll(seconds):
        raise TimeoutError(f"rank {rank} has not answered in {seconds} s")
    try:
        ok, value = torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)
    except EOFError:
        return Left("died", "the process ended without a word")
    return value if ok else Left(*value)


def alike(results: list[Any]) -> list[Any]:
    """The results, which none of the processes may have failed to give."""
    for r in results:
        if isinstance(r, Left):
            raise AssertionError(str(r))
    return results
