"""Following code: what functions, classes and modules of the user's can read, as far as a walk is concerned.

A name leads to a global, a cell, a default value or a class attribute; each has one path wherever it is reached from
(``("globals", module, name)``), so that a call finds again what stands there then.  Code of libraries is followed
only as far as it carries the user's: closures of decorators, attributes of modules that the user's code names.
"""

from __future__ import annotations

import builtins
import functools
import gc
import os
import sys
import types
from typing import Any

from torch import Tensor, nn

from mlc.trace.python.found import Found
from mlc.trace.python.frames import is_user_code
from mlc.trace.python.names import names
from mlc.trace.python.places import Path, Walk
from mlc.trace.python.view import MISSING, fields_of, is_followed_module, is_opaque, is_user_class

__all__ = ["CALLABLES", "Follower"]

_CACHED = functools._lru_cache_wrapper
CALLABLES = (types.FunctionType, types.MethodType, functools.partial, functools.partialmethod, staticmethod,
             classmethod, property, functools.cached_property, _CACHED)  # fmt: skip
_VALUES = (int, float, bool, str, complex, type(None), Tensor, nn.Module)
_MADE = {"__module__", "__doc__", "__dict__", "__weakref__", "__slots__", "__annotations__", "__qualname__",
         "__abstractmethods__", "_abc_impl", "__parameters__", "__dataclass_fields__", "__dataclass_params__",
         "__match_args__", "__orig_bases__", "__static_attributes__", "__firstlineno__", "__hash__"}  # fmt: skip
_MADE_MODULE = {"__name__", "__doc__", "__package__", "__loader__", "__spec__", "__file__", "__cached__",
                "__builtins__", "__annotations__"}  # fmt: skip


class Follower:
    """Follows code on behalf of a walk.

    Args:
        walker: The walk.
        found: What ran; None: nothing is known, all code of the user's counts.
    """

    def __init__(self, walker: Walk, found: Found | None) -> None:
        self.w = walker
        self.found = found
        self.changed = frozenset() if found is None else found.changed
        self.loads: set[str] = set() if found is None else set(found.loads)
        self._done: set[tuple[int, str]] = set()
        self._scopes: dict[str, int] = {}
        self._codes: set[tuple[int, int]] = set()
        self._modules: list[tuple[types.ModuleType, int]] = []

    # ---- kinds of objects

    def callable(self, f: object, path: Path, depth: int) -> None:
        """A function of any kind."""
        if isinstance(f, types.MethodType):
            self.w.visit(f.__self__, (*path, "self"), depth)
            self._function(f.__func__, path, depth)
        elif isinstance(f, functools.partial):
            for part in ("func", "args", "keywords"):
                self.w.visit(getattr(f, part), (*path, part), depth)
        elif isinstance(f, functools.partialmethod):
            self.w.visit((f.func, f.args, f.keywords), (*path, "partial"), depth)
        elif isinstance(f, (staticmethod, classmethod)):
            self.w.visit(f.__func__, (*path, "func"), depth)
        elif isinstance(f, property):
            self.w.visit(f.fget, (*path, "func"), depth)
        elif isinstance(f, functools.cached_property):
            self.w.visit(f.func, (*path, "func"), depth)
        elif isinstance(f, _CACHED):
            self.w.visit(f.__wrapped__, (*path, "func"), depth)
            for i, v in enumerate(_remembered(f)):
                self.w.visit(v, (*path, "cache", i), depth)
        else:
            self._function(f, path, depth)

    def _function(self, f: object, path: Path, depth: int) -> None:
        if not isinstance(f, types.FunctionType):
            if isinstance(f, CALLABLES):
                self.callable(f, path, depth)
            return
        first = self.w.r.paths.get(id(f))
        if first is not None and first != path:
            self.w.note(path, first)
            return
        self.w.hold(f, path)
        if not is_user_code(f.__code__):
            self._wrapper(f, path, depth)
            return
        self.w.note(path, "code", f.__code__)
        if self.found is not None and f.__code__ not in self.found.executed:
            return
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            self._bound((*path, "closure", name), cell, name, depth)
        for i, v in enumerate(f.__defaults__ or ()):
            self.w.visit(v, (*path, "default", i), depth)
        for k, v in (f.__kwdefaults__ or {}).items():
            self.w.visit(v, (*path, "default", k), depth)
        self.w.named(self.w.view.attrs(f), path, depth)
        self.code(f.__code__, f.__globals__, depth)

    def _wrapper(self, f: types.FunctionType, path: Path, depth: int) -> None:
        """A function of a library: only for what it wraps of the user's."""
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            v = self.w.view.bound(cell, name)
            if isinstance(v, (*CALLABLES, Tensor, nn.Module)) or is_user_class(type(v)):
                self._bound((*path, "closure", name), cell, name, depth)
        wrapped = f.__dict__.get("__wrapped__")
        if wrapped is not None:
            self.w.visit(wrapped, (*path, ".__wrapped__"), depth)

    def _bound(self, path: Path, owner: object, name: str, depth: int) -> None:
        value = self.w.view.bound(owner, name)
        self.w.r.bindings.append((path, owner, name))
        if value is not MISSING:
            self.w.visit(value, path, depth)

    def of(self, x: object, path: Path, depth: int) -> None:
        """The class of an instance."""
        if is_user_class(type(x)):
            self.w.visit(type(x), (*path, "class"), depth)

    def cls(self, c: type, path: Path, depth: int) -> None:
        """Attributes of a class of the user's: those that running code loads by name, and methods that ran."""
        if not is_user_class(c):
            return
        self.w.hold(c, path)
        self.w.r.visited.append((path, c))
        for name in list(c.__dict__):
            if name in _MADE:
                continue
            value = self.w.view.bound(c, name)
            if isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType):
                continue
            if self.found is None or name in self.loads or self._ran(value):
                self._bound((*path, "." + name), c, name, depth)
        for i, base in enumerate(c.__mro__[1:]):
            if is_user_class(base):
                self.w.visit(base, (*path, "base", i), depth)

    def _ran(self, f: object) -> bool:
        f = getattr(f, "__func__", f)
        while isinstance(f, types.FunctionType):
            if self.found is not None and f.__code__ in self.found.executed:
                return True
            f = f.__dict__.get("__wrapped__")
        return isinstance(f, property) and self._ran(f.fget)

    def module(self, m: types.ModuleType, depth: int) -> None:
        """Attributes of a module of the user's that code loads by name."""
        if not is_followed_module(m):
            return
        self._modules.append((m, depth))
        for name in list(m.__dict__):
            if name in self.loads and name not in _MADE_MODULE:
                self.chain(m.__dict__, (name,), depth)

    def opaque(self, x: object, path: Path, depth: int) -> None:
        """A method of a built-in object leads to that object."""
        owner = getattr(x, "__self__", None) if isinstance(x, types.BuiltinFunctionType) else None
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.w.visit(owner, (*path, "self"), depth)

    # ---- names

    def code(self, code: types.CodeType, scope: dict[str, Any], depth: int) -> None:
        """Everything that a piece of code names."""
        if (id(code), id(scope)) in self._codes:
            return
        self._codes.add((id(code), id(scope)))
        here = names(code)
        if self.found is None:
            self.loads |= here.loads
            for c in code.co_consts:
                if isinstance(c, types.CodeType):
                    self.code(c, scope, depth)
        for chain in here.chains:
            if chain[0].startswith("import "):
                self._imported(chain, scope, depth)
            else:
                self.chain(scope, chain, depth)

    def _environment(self) -> None:
        """Variables of the environment whose names the code holds."""
        for name in sorted(self.loads & os.environ.keys()):
            if (id(os), name) not in self._done:
                self._done.add((id(os), name))
                self.w.note(("environ", name), os.environ[name])

    def _imported(self, chain: tuple[str, ...], scope: dict[str, Any], depth: int) -> None:
        """``import a.b`` and ``from a import b`` within a function."""
        name = chain[0].removeprefix("import ")
        package = scope.get("__package__") or ""
        for full in (name, f"{package}.{name}" if name else package):
            m = sys.modules.get(full)
            if m is not None:
                self.module(m, depth)
                if len(chain) > 1:
                    self.chain(m.__dict__, chain[1:], depth)

    def chain(self, scope: dict[str, Any], chain: tuple[str, ...], depth: int) -> None:
        """A global and the attributes loaded from it."""
        name, *rest = chain
        value = self.w.view.bound(scope, name)
        if value is os.environ or (value is os and rest and rest[0] in ("environ", "getenv")):
            self._environment()
        path: Path = ("globals", self._scope(scope), name)
        if isinstance(value, types.ModuleType):
            self._binding(path, scope, name, depth)
            if rest:
                self.chain(value.__dict__, tuple(rest), depth)
            return
        users = self._is_users(scope)
        if users or isinstance(value, _VALUES) or is_user_class(type(value)) or _is_users_function(value):
            self._binding(path, scope, name, depth)
        elif rest and value is not MISSING and not is_opaque(value) and not isinstance(value, (type, *CALLABLES)):
            self._attribute(value, path, rest, depth)

    def _attribute(self, x: object, path: Path, rest: list[str], depth: int) -> None:
        """A chain of attributes of a library's object, for the plain value at its end."""
        for name in rest:
            x, path = fields_of(x).get(name, MISSING), (*path, "." + name)
        if isinstance(x, _VALUES):
            self.w.visit(x, path, depth)

    def _binding(self, path: Path, scope: dict[str, Any], name: str, depth: int) -> None:
        if (id(scope), name) in self._done:
            return
        self._done.add((id(scope), name))
        value = self.w.view.bound(scope, name)
        if value is MISSING and hasattr(builtins, name):
            return
        self.w.r.places[("globals", path[1])] = scope
        self.w.r.bindings.append((path, scope, name))
        if value is MISSING:
            self.w.note(path, "missing")
        elif not _is_librarys(value):
            self.w.visit(value, path, depth)

    def _is_users(self, scope: dict[str, Any]) -> bool:
        m = types.ModuleType("probe")
        m.__dict__.update({k: scope[k] for k in ("__file__", "__spec__") if k in scope})
        return scope.get("__name__") == "__main__" or is_followed_module(m)

    def _scope(self, scope: dict[str, Any]) -> str:
        """A name for a namespace; another one of the same name gets a number."""
        name = str(scope.get("__name__", "?"))
        k = 0
        while self._scopes.setdefault(name if not k else f"{name}#{k}", id(scope)) != id(scope):
            k += 1
        return name if not k else f"{name}#{k}"

    def rest(self) -> None:
        """What ran without being reached yet; or, when that is not known, modules whose names were loaded later."""
        if self.found is not None:
            for i, f in enumerate(self.found.functions):
                self.w.visit(f, ("function", i))
            for code, scope in self.found.codes:
                self.code(code, scope, 1)
            for i, x in enumerate(self.found.objects):
                self.w.visit(x, ("object", i))
            return
        before = -1
        while before != len(self.loads) + len(self._modules):
            before = len(self.loads) + len(self._modules)
            for m, depth in list(self._modules):
                for name in list(m.__dict__):
                    if name in self.loads and name not in _MADE_MODULE:
                        self.chain(m.__dict__, (name,), depth)


def _is_users_function(x: object) -> bool:
    return isinstance(x, types.FunctionType) and is_user_code(x.__code__)


def _is_librarys(x: object) -> bool:
    """A function or class of a library without anything of the user's in it."""
    if isinstance(x, types.FunctionType):
        return not is_user_code(x.__code__) and not x.__closure__ and "__wrapped__" not in x.__dict__
    return isinstance(x, (types.BuiltinFunctionType, types.MethodWrapperType)) or (
        isinstance(x, type) and not is_user_class(x)
    )


def _remembered(f: object) -> list[Any]:
    """Results (and keys) that an ``lru_cache`` holds: a bounded one in links of its own, another in its dict."""
    out: list[Any] = []
    for x in gc.get_referents(f):
        if type(x) is dict:
            out += [v for v in x.values() if x is not f.__dict__ and type(v).__name__ != "_lru_list_elem"]
        elif not isinstance(x, (type, *CALLABLES)):
            out.append(x)
    return out
