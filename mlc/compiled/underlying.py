"""The user's function behind a compiled one."""

from __future__ import annotations

import functools
from typing import Any

from mlc.compiled.compiled import CompiledFunction

__all__ = ["underlying"]


def underlying(fn: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The user's function behind ``fn`` (compiled or not), its arguments, and its compile options."""
    if isinstance(fn, functools.partial) and isinstance(fn.func, CompiledFunction) and not fn.keywords:
        fn, args = fn.func, (*fn.args, *args)  # a compiled method
    return (fn.fn, args, fn.options) if isinstance(fn, CompiledFunction) else (fn, args, {})
