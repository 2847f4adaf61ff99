"""Around a check: PyTorch's settings while the user's function runs on copies, and errors with a line of theirs."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from mlc.check.sandbox import convert
from mlc.errors import MlcError
from mlc.trace.capture import place_of
from mlc.units import parse_memory

__all__ = ["placed", "scaled", "surroundings"]


def placed(e: MlcError, fn: object) -> None:
    """Give the error a line: that of the function where none is nearer."""
    if e.loc is None:
        e.loc = place_of(fn)
        e.args = (e._message(),)


def scaled(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same options; a budget grows with the size of a number, so that the same decisions are checked."""
    memory = parse_memory(options.get("memory"))
    if isinstance(memory, int) and dtype is torch.float64:
        return {**options, "memory": 2 * memory}
    return options


@contextlib.contextmanager
def surroundings(dtype: torch.dtype) -> Iterator[None]:
    """Default dtype, silence, no compilation of the user's modules, loaders that give ``dtype``."""
    default, iterate = torch.get_default_dtype(), DataLoader.__iter__
    stance = getattr(torch.compiler, "set_stance", None)
    silence = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        stack.callback(setattr, DataLoader, "__iter__", iterate)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(contextlib.redirect_stdout(silence))
        stack.enter_context(contextlib.redirect_stderr(silence))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if stance is not None:
            stack.enter_context(stance("force_eager"))
        if dtype is torch.float64:
            torch.set_default_dtype(dtype)
            DataLoader.__iter__ = lambda self: map(lambda x: convert(x, dtype), iterate(self))  # type: ignore
        yield
