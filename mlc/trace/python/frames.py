"""Where the user's code is, and which iteration of which of their loops it is in.

Loops are found from the running frames: a backward jump in the bytecode of a user's frame starts a new iteration.
That needs no source transformation and no tracing function, sees ``for`` and ``while`` alike, and ignores loops of
libraries (layers of ``nn.Sequential``, parameters of an optimizer), which are not loops of the program.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import os
import site as _site
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch

from mlc.ir.types import Loc
from mlc.trace.python.modulepaths import ModulePaths

__all__ = ["GENERATED", "Site", "Sites", "is_user_code", "is_user_module"]

GENERATED = "<levels of "  # so begin the file names of loops that are written for the user: they are the user\'s
_HERE = str(Path(__file__).resolve().parents[2]) + os.sep  # of mlc
_LIBRARIES = tuple(
    os.path.realpath(p) + os.sep
    for p in {*sysconfig.get_paths().values(), *_site.getsitepackages(), os.path.dirname(os.__file__)}
    if p and p not in ("/", sys.prefix, sys.base_prefix)
)
_DISPATCH = (_HERE, os.path.join(os.path.dirname(torch.__file__), "_compile.py"))  # under which an operator runs
_COROUTINE = 0x20 | 0x80 | 0x100 | 0x200


def is_user_code(code: CodeType) -> bool:
    """Whether code belongs to the user (not to mlc, an installed package or the standard library)."""
    return is_user_file(code.co_filename)


def is_user_module(m: object) -> bool:
    """Whether a module is the user's."""
    there = m.__dict__ if isinstance(m, ModuleType) else {}
    file = there.get("__file__")  # not by getattr: some libraries load at a question
    return there.get("__name__") == "__main__" or (isinstance(file, str) and is_user_file(file))


@cache
def is_user_file(file: str) -> bool:
    """Whether a file is the user's: neither ours nor a library's."""
    if file.startswith(GENERATED):
        return True
    if file.startswith("<") and "ipython" not in file and file not in ("<stdin>", "<string>"):
        return False
    real = os.path.realpath(file)
    return not (real.startswith(_HERE) or real.startswith(_LIBRARIES))


@cache
def _loops(code: CodeType) -> tuple[tuple[int, int], ...]:
    """Byte ranges of the loops of a code object, outermost first."""
    ends: dict[int, int] = {}
    if code.co_flags & _COROUTINE:
        return ()
    for i in dis.get_instructions(code):
        if "JUMP_BACKWARD" in i.opname and "NO_INTERRUPT" not in i.opname and isinstance(i.argval, int):
            ends[i.argval] = max(ends.get(i.argval, 0), i.offset)
    return tuple(sorted(ends.items(), key=lambda r: (r[0], -r[1])))


@cache
def _calls(code: CodeType) -> dict[int, int]:
    """From ``CALL`` to the ``PRECALL`` before it, where Python 3.11 runs a call that it has specialised (offsets)."""
    out: dict[int, int] = {}
    before = None
    for i in dis.get_instructions(code):
        if before is not None and before.opname == "PRECALL" and i.opname == "CALL":
            out[i.offset] = before.offset
        before = i
    return out


_YIELDS = {dis.opmap["YIELD_VALUE"], dis.opmap.get("RESUME")}


def _suspended(f: FrameType) -> bool:
    """Whether a frame is that of a generator that waits to be asked for its next value."""
    code = f.f_code
    return bool(code.co_flags & inspect.CO_GENERATOR) and f.f_back is None and code.co_code[f.f_lasti] in _YIELDS


def _at(f: FrameType) -> int:
    """Byte offset where a frame stands: the same at every execution of an instruction."""
    return _calls(f.f_code).get(f.f_lasti, f.f_lasti)


@dataclass(frozen=True, slots=True)
class Site:
    """Loop iterations around an equation, outermost first, and its place in the innermost.

    Attributes:
        path: ``(loop instance, iteration)`` pairs.
        key: Byte offsets of the user's frames: equal for the same instruction in different iterations.
    """

    path: tuple[tuple[int, int], ...]
    key: tuple[Any, ...]


def _loc(f: FrameType, caller: Loc | None, module: str = "") -> Loc:
    return _loc_at(f.f_code.co_filename, f.f_lineno or 0, f.f_code.co_name, caller, module)


_loc_at = cache(Loc)  # many operators run on one line


@dataclass
class _Frame:
    frame: FrameType
    last: int = -1
    loops: list[list[int]] = field(default_factory=list)  # [start, end, instance, iteration]


class Sites:
    """Follows the user's frames between recorded events."""

    def __init__(self) -> None:
        self.base: FrameType | None = None
        self._stack: list[_Frame] = []
        self._under: FrameType | None = None
        self._ids = itertools.count()
        self._modules = ModulePaths()
        self._cached: tuple[Any, Site] | None = None

    def begin(self, base: FrameType) -> None:
        """Frames called from ``base`` are the user's."""
        self.base = base

    def end(self) -> None:
        """Forget all frames."""
        self.base = self._under = self._cached = None
        self._stack.clear()
        self._modules = ModulePaths()

    def here(self) -> tuple[Loc | None, Site | None]:
        """Place of the running user code and its loop iterations."""
        frames: list[FrameType] = []
        f: FrameType | None = sys._getframe(1)
        while f is not None and f is not self.base:
            frames.append(f)
            f = f.f_back
        if f is None:
            return None, None
        chain: list[FrameType] = []
        under: FrameType | None = None
        for g in reversed(frames):
            if is_user_file(g.f_code.co_filename):
                chain.append(g)
            elif chain:
                under = None if g.f_code.co_filename.startswith(_DISPATCH) else g
                break
        if not chain:
            return None, None
        key = (tuple((id(g), g.f_lasti) for g in chain), under)
        if self._cached is not None and self._cached[0] == key:
            site = self._cached[1]
        else:
            site = self._advance(chain, under)
            self._cached = (key, site)
        inner = next((g for g in frames if is_user_file(g.f_code.co_filename)), chain[-1])
        caller = None if inner is chain[0] else _loc(chain[0], None)
        return _loc(inner, caller, self._modules.of(frames, is_user_code)), site

    def _advance(self, chain: list[FrameType], under: FrameType | None) -> Site:
        stack = self._stack
        same = 0
        while same < len(stack) and same < len(chain) and stack[same].frame is chain[same]:
            same += 1
        renewed = same < len(stack) or under is not self._under
        if same < len(stack) and _suspended(stack[same].frame):
            renewed = False  # sum() and its kin take the next value of a generator in one and the same call
        del stack[same:]
        for g in chain[same:]:
            stack.append(_Frame(g))
        for depth, s in enumerate(stack):
            deepest_known = depth == same - 1
            self._move(s, _at(chain[depth]), renewed and deepest_known)
        self._under = under
        path = tuple((loop[2], loop[3]) for s in stack for loop in s.loops)
        return Site(path, tuple((id(s.frame.f_code), s.last) for s in stack))

    def _move(self, s: _Frame, at: int, renewed: bool) -> None:
        kept = [loop for loop in s.loops if loop[0] <= at <= loop[1]]
        back = at < s.last or (at == s.last and renewed)
        if back and kept and len(kept) <= len(s.loops):
            inner = kept[-1]
            if inner[0] <= s.last <= inner[1]:
                inner[3] += 1
        known = {loop[0] for loop in kept}
        for start, end in _loops(s.frame.f_code):
            if start <= at <= end and start not in known:
                kept.append([start, end, next(self._ids), 0])
        s.loops = kept
        s.last = at
