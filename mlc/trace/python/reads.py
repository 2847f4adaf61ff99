"""What Python really ran during a call, so that what it read can be found again.

While the user's function runs, a profile function notes every code object once: whose code it is, its globals, and
what ``self`` it got. Python's collector tells objects made meanwhile from those before. Afterwards a
:class:`~mlc.trace.python.found.Found` says which code counts; :func:`~mlc.trace.python.inputs.walk` follows the names
in it. Nothing of the user's is replaced or wrapped, and other profilers go on being called.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys
import types
from collections.abc import Callable
from threading import get_ident
from types import CodeType, FrameType
from typing import Any

from torch.autograd.function import FunctionCtx

from mlc.trace.python.found import Found
from mlc.trace.python.frames import is_user_code
from mlc.trace.python.inputs import walk
from mlc.trace.python.names import names
from mlc.trace.python.view import is_user_class
from mlc.trace.python.world import World

__all__ = ["Reads"]

_COPIERS = {
    id(f.__code__)
    for f in (copy.copy, copy.deepcopy, dataclasses.replace, dataclasses.asdict, dataclasses.astuple,
              getattr(dataclasses, "_asdict_inner", copy.copy), getattr(dataclasses, "_astuple_inner", copy.copy))
}  # fmt: skip
_NODE_HOOKS = {"register_hook", "register_prehook"}  # in C: of nodes of PyTorch's graph
_SELVES = 256  # different objects per method that are noted


class Reads:
    """A context in which the user's function runs; of this thread only.

    Raises:
        Nothing of its own: a profiler that was active is called with every event, and put back.
    """

    def __init__(self) -> None:
        self._seen: dict[int, CodeType] = {}
        self._users: dict[int, tuple[CodeType, dict[str, Any]]] = {}
        self._selves: dict[int, dict[int, Any]] = {}
        self._functions: list[types.FunctionType] = []
        self._copied: set[int] = set()
        self._outer: Any = None
        self._event: Any = None
        self._frozen = False
        self._thread = 0
        self._pauses = 0
        self._before: set[int] = set()  # what was there and not frozen, where the user froze something
        self._made: set[int] | None = None
        self.hooked_nodes: list[tuple[CodeType, int]] = []  # where hooks were put on nodes of PyTorch's graph

    def __enter__(self) -> Reads:
        if gc.get_freeze_count():  # the user's own frozen objects would be let go at the end
            self._before = set(map(id, gc.get_objects()))
        else:
            gc.freeze()
            self._frozen = True
        self._outer = sys.getprofile()
        self._event = self._profile()
        self._thread = get_ident()
        sys.setprofile(self._event)
        return self

    def pause(self) -> bool:
        """Let code run unnoticed (the recorder's own, under every operator): that doubles the speed of a recording.

        Returns:
            Whether :meth:`resume` is to be called, once for each pause: not on other threads, and not after the end.
        """
        if get_ident() != self._thread:
            return False
        if not self._pauses:
            sys.setprofile(None)
        self._pauses += 1
        return True

    def resume(self) -> None:
        """Notice again, when all pauses are over."""
        self._pauses -= 1
        if not self._pauses:
            sys.setprofile(self._event)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self._thread = self._pauses = 0
        if self._frozen:
            self._made = set(map(id, gc.get_objects()))
            gc.unfreeze()
        else:
            self._made = set(map(id, gc.get_objects())) - self._before
        if self._outer is None:
            return
        if callable(self._outer):
            sys.setprofile(self._outer)
        else:
            self._outer.enable()  # a profiler in C, which is no profile function itself

    def made_now(self, x: object) -> bool:
        """Whether an object was made since the run began, while it goes on."""
        return id(x) not in self._before and any(y is x for y in gc.get_objects())

    def _profile(self) -> Callable[[FrameType, str, Any], Any]:
        seen, users, copied = self._seen, self._users, self._copied
        outer = self._outer if callable(self._outer) else None

        def event(frame: FrameType, what: str, arg: Any) -> None:
            if what == "call":
                code = frame.f_code
                key = id(code)
                if key not in seen:
                    seen[key] = code
                    if is_user_code(code):
                        users[key] = (code, frame.f_globals)
                        self._selves[key] = {}
                if key in _COPIERS:
                    copied.add(id(frame.f_locals.get(code.co_varnames[0])))
                elif key in users and code.co_argcount:
                    self._self(key, frame, code)
            elif what == "c_call" and arg.__name__ in _NODE_HOOKS and is_user_code(frame.f_code):
                self.hooked_nodes.append((frame.f_code, frame.f_lineno))
            if outer is not None:
                outer(frame, what, arg)

        return event

    def _self(self, key: int, frame: FrameType, code: CodeType) -> None:
        """The first argument, when it is an object that could be of the user's."""
        known = self._selves[key]
        if len(known) >= _SELVES:
            return
        x = frame.f_locals.get(code.co_varnames[0])
        if id(x) in known:
            return
        if isinstance(x, FunctionCtx):  # its backward may run on a thread of the device
            self._backward(type(x))
        elif is_user_class(type(x)) or (isinstance(x, type) and is_user_class(x)):
            known[id(x)] = x

    def _backward(self, ctx: type) -> None:
        f = getattr(getattr(ctx, "_forward_cls", None), "backward", None)
        if isinstance(f, types.FunctionType) and is_user_code(f.__code__):
            self._users.setdefault(id(f.__code__), (f.__code__, f.__globals__))
            self._selves.setdefault(id(f.__code__), {})
            self._seen.setdefault(id(f.__code__), f.__code__)

    # ---- afterwards

    def found(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], before: World) -> Found:
        """What ran, with the functions and objects that no path leads to.

        Args:
            fn: The function that ran under this context.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            before: The :class:`~mlc.trace.python.world.World` made before the run.
        """
        before.made = self._made
        users = sorted(self._users.values(), key=lambda c: _order(c[0]))
        known = [names(c) for c, _ in users]
        libraries: dict[str, set[CodeType]] = {}
        for key, code in self._seen.items():
            if key not in self._users:
                libraries.setdefault(_package(code), set()).add(code)
        kept = tuple(sorted((k, frozenset(v)) for k, v in libraries.items() if k not in ("", "mlc")))
        dynamic = any(n.all for n in known)
        loads = frozenset[str]().union(*(n.loads for n in known))
        executed = frozenset(c for c, _ in users)
        found = Found(tuple(users), executed, loads, libraries=kept, copied=frozenset(self._copied), dynamic=dynamic)
        roots = walk(fn, args, kwargs, found, before)
        functions = self._closures(roots.paths, before)
        objects = tuple(
            x
            for key in map(id, (c for c, _ in users))
            for x in self._selves[key].values()
            if id(x) not in roots.paths and before.was_there(x)
        )
        unique = tuple({id(x): x for x in objects}.values())
        return Found(tuple(users), executed, loads, functions, unique, kept, found.copied, dynamic)

    def _closures(self, reached: dict[int, Any], before: World) -> tuple[types.FunctionType, ...]:
        """Functions with values of their own that ran, were there before and are reached by no path."""
        made = {c for code, _ in self._users.values() for c in code.co_consts if isinstance(c, CodeType)}
        codes = [c for c, _ in self._users.values() if _holds_values(c) and c not in made]
        if not codes:
            return ()
        return tuple(
            f
            for f in gc.get_referrers(*codes)
            if isinstance(f, types.FunctionType) and id(f) not in reached and before.was_there(f)
        )


def _holds_values(code: CodeType) -> bool:
    """Whether functions of this code may differ in values: not methods that name their class, nor a dataclass's own."""
    return bool(set(code.co_freevars) - {"__class__"}) and not code.co_qualname.startswith("__create_fn__.")


def _order(code: CodeType) -> tuple[str, int, str]:
    return code.co_filename, code.co_firstlineno, code.co_qualname


def _package(code: CodeType) -> str:
    """Top-level package of a library's file; empty for Python's own and PyTorch's."""
    parts = code.co_filename.replace("\\", "/").split("/")
    for home in ("site-packages", "dist-packages"):
        if home in parts[:-1]:
            return parts[parts.index(home) + 1].removesuffix(".py")
    return ""
