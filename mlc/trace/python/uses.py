"""Whether code that ran could read what a place held before the call.

A counter that is only counted up (``self.n += 1``), a log that is only appended to, an attribute that is only set: the
call changes them, and what they held before reaches nothing that it computes. Such places need not be equal for a
program to be used again; all others stay in the key. The answer is by name and errs on the side of "read".
"""

from __future__ import annotations

from collections import defaultdict
from types import CodeType, FunctionType

from mlc.trace.python.found import Found
from mlc.trace.python.names import Names, names
from mlc.trace.python.places import Path, Roots

__all__ = ["Uses"]


class Uses:
    """How code that ran uses places.

    Args:
        found: The code.
        roots: A walk that it restricts; knows under which paths one object is found.
        parameters: Names of the positional parameters of the function.
    """

    def __init__(self, found: Found, roots: Roots, parameters: tuple[str, ...]) -> None:
        self._found = found
        self._parameters = parameters
        self._user = [names(c) for c, _ in found.codes]
        self._libraries = dict(found.libraries)
        self._ran = found.executed.union(*self._libraries.values())
        self.aliases: dict[Path, list[Path]] = defaultdict(list)
        for entry in roots.key:
            if len(entry) == 2 and isinstance(entry[1], tuple) and (entry[1] in roots.places or entry[1] in roots.at):
                self.aliases[entry[1]].append(entry[0])
        self._kept = [*roots.optimizers, *roots.schedulers]
        self._of_class: dict[type, list[Names]] = {}

    def of(self, path: Path | None, name: str | None, owner: object, *values: object) -> str:
        """``"read"``, ``"grown"`` (only added to) or ``"written"``.

        Args:
            path: Of the object that changed in itself; None: it is found by no path.
            name: The attribute or variable that changed; None: a container at ``path`` did.
            owner: The object with the attribute.
            values: What it held and holds: where that is something to call, calls count as reading.
        """
        if (
            path is None
            or self._found.dynamic
            or id(owner) in self._found.copied
            or any(path[: len(p)] == p for p in self._kept)
        ):
            return "read"
        handles = {name} if name is not None else {self._handle(p) for p in (path, *self.aliases.get(path, ()))}
        if None in handles:
            return "read"
        codes = [*self._user, *self._class(type(owner))]
        if any(h in n.reads for h in handles for n in codes):
            return "read"
        if any(map(callable, values)) and any(h in n.called for h in handles for n in codes):
            return "read"
        return "grown" if any(h in n.grown for h in handles for n in codes) else "written"

    def edited(self, path: Path | None, owner: object) -> bool:
        """Whether code sets or deletes entries or slices of a container: what that does depends on its length."""
        if path is None:
            return True
        handles = {self._handle(p) for p in (path, *self.aliases.get(path, ()))}
        return any(h in n.edited for h in handles for n in [*self._user, *self._class(type(owner))] if h is not None)

    def _handle(self, path: Path) -> str | None:
        """The name by which code gets at the object at a path."""
        for i in range(len(path) - 1, -1, -1):
            part = path[i]
            if isinstance(part, str) and part.startswith("."):
                return part[1:]
            if i and path[i - 1] == "closure":
                return str(part)
        if path[0] == "globals" and len(path) > 2:
            return str(path[2])
        if path[0] == "args" and isinstance(path[1], int) and path[1] < len(self._parameters):
            return self._parameters[path[1]]
        return path[1] if path[0] == "args" and isinstance(path[1], str) else None

    def _class(self, cls: type) -> list[Names]:
        """Code of libraries that may use the attributes of an object: of its classes, and of their packages."""
        known = self._of_class.get(cls)
        if known is None:
            codes: set[CodeType] = set()
            for c in cls.__mro__:
                home = (c.__module__ or "").split(".")[0]
                codes |= self._libraries.get(home, frozenset()) if home != "torch" else frozenset()
                for f in vars(c).values():
                    f = getattr(f, "__func__", f)
                    f = f.fget if isinstance(f, property) else f
                    if isinstance(f, FunctionType) and f.__code__ in self._ran:
                        codes.add(f.__code__)
            known = self._of_class[cls] = [names(c) for c in codes]
        return known
