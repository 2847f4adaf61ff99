"""Which of the user's modules is running, by the name that its caller has for it: ``model.blocks.0.mlp``.

Frames of ``nn.Module.__call__`` on the stack tell the modules; the outermost one is named by the variable of
the function that calls it, the others by where they stand inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CodeType, FrameType

from torch import nn

__all__ = ["ModulePaths"]

_CALL: CodeType = nn.Module._call_impl.__code__


class ModulePaths:
    """Names of running modules; remembers those it has seen (a module keeps its name while one trace lasts)."""

    def __init__(self) -> None:
        self._roots: dict[int, tuple[nn.Module, dict[int, str]]] = {}

    def of(self, frames: Sequence[FrameType], is_user: Callable[[CodeType], bool]) -> str:
        """The name of the innermost running module; empty outside of all.

        Args:
            frames: Frames, innermost first.
            is_user: Whether code is the user's.
        """
        running = [i for i, f in enumerate(frames) if f.f_code is _CALL]
        if not running:
            return ""
        outer, inner = (frames[i].f_locals["self"] for i in (running[-1], running[0]))
        names = self._names(outer, [f for f in frames[running[-1] :] if is_user(f.f_code)])
        found = names.get(id(inner))
        if found is None:  # called from outside of its parent: by its class, inside the outermost
            found = f"{names[id(outer)]}.{type(inner).__name__}"
        return found

    def _names(self, root: nn.Module, callers: Sequence[FrameType]) -> dict[int, str]:
        known = self._roots.get(id(root))
        if known is None:
            title = _variable(root, callers) or type(root).__name__
            names: dict[int, str] = {}
            for path, m in root.named_modules():
                inside = path.replace("_orig_mod.", "").replace("_orig_mod", "")  # torch.compile wraps
                names.setdefault(id(m), f"{title}.{inside}" if inside else title)
            known = self._roots[id(root)] = (root, names)
        return known[1]


def _variable(module: nn.Module, callers: Sequence[FrameType]) -> str:
    """The caller's variable, or attribute of its ``self``, that holds the module."""
    for f in callers[:1]:
        for scope in (f.f_locals, f.f_globals):
            for name, value in scope.items():
                if value is module:
                    return name
        attributes = getattr(f.f_locals.get("self"), "__dict__", {})
        for name, value in attributes.items():
            if value is module:
                return str(name)
    return ""
