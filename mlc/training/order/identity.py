"""What a level is, in words: enough to notice that a checkpoint is of another program.

Names and shapes of levels are alike in many programs.  These words add what each loss computes, the optimizer with its
hyperparameters as the program gave them, and what the level says; what changes during a training, or with the objects
of one process, is left out.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Mapping
from typing import Any

from mlc.training.level import Level

__all__ = ["differing", "identity", "numbers_in"]


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def identity(level: Level, computes: str) -> dict[str, str]:
    """What a level is, by part; ``computes``: a hash of what its loss computes."""
    scheduler = "None" if level.scheduler is None else type(level.scheduler).__name__
    clip = level.clip if isinstance(level.clip, float) or level.clip is None else "a function"
    said = {
        "loss": computes, "optimizer": _optimizer(level), "scheduler": scheduler, "steps": level.steps,
        "accumulate": level.accumulate, "clip": clip, "start": "cold" if level.cold else "warm",
        "rollback": level.rollback, "response": level.response, "data": type(level.feed.data).__name__,
    }  # fmt: skip
    return {k: _ADDRESS.sub("", str(v)) for k, v in said.items()}


def differing(theirs: Mapping[str, Mapping[str, str]], mine: Mapping[str, Mapping[str, str]]) -> str | None:
    """The first part in which levels of these names differ, as a sentence."""
    for name, parts in mine.items():
        for part, text in parts.items():
            was = theirs[name].get(part)
            if was == text:
                continue
            if part == "loss":
                return f"the loss of level {name!r} computes something else there"
            return f"level {name!r} has {part} {was} there, and {text} here"
    return None


def numbers_in(loss: Any, depth: int = 4) -> str:
    """Numbers written in the code of a function and of those inside of it; nothing for other callables."""
    if isinstance(loss, functools.partial):
        return numbers_in(loss.func, depth)
    code = getattr(getattr(loss, "__func__", loss), "__code__", None)
    return _numbers(code, depth) if isinstance(code, types.CodeType) else ""


def _numbers(code: types.CodeType, depth: int) -> str:
    found = []
    for c in code.co_consts:
        if type(c) in (int, float, bool):
            found.append(repr(c))
        elif isinstance(c, types.CodeType) and depth:
            found.append(_numbers(c, depth - 1))
    return f"({' '.join(found)})"


def _optimizer(level: Level) -> str:
    groups = []
    for g in level.optimizer.param_groups:
        said = [f"{k}={v}" for k, v in sorted(g.items()) if k not in ("params", "initial_lr") and _is_plain(v)]
        groups.append(", ".join(said))
    return f"{type(level.optimizer).__name__}({'; '.join(groups)})"


def _is_plain(v: Any) -> bool:
    return all(type(x) in (int, float, bool) for x in (v if isinstance(v, tuple) else (v,)))
