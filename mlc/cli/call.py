"""Calls that the command line makes: a function on its example arguments with its gradient, recorded or not."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.cli.userfile import UserFile
from mlc.compiled.compiled import CompiledFunction, compile
from mlc.compiled.report import Report
from mlc.compiled.underlying import underlying
from mlc.runtime.interpreter.recording import recording
from mlc.view.page import Measured

__all__ = ["Called", "called", "measured", "subject"]


@dataclass(frozen=True)
class Called:
    """A call and its gradient.

    Attributes:
        values: Tensors that it returned, detached.
        gradients: Of every meta-parameter by name; None where there is no path.
        report: What the call measured.
    """

    values: list[Tensor]
    gradients: dict[str, Tensor | None]
    report: Report


def subject(file: UserFile) -> tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """The function that is meant, its example arguments, and the options it was compiled with."""
    found = file.function()
    args, kwargs = file.arguments()
    fn, args, options = underlying(found, args)
    return fn, args, kwargs, options


def called(fn: CompiledFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called:
    """The first call with the gradient of everything returned; what the user prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        outs = _tensors(fn(*args, **kwargs))
        assert fn.program is not None
        externals = fn.program.binding.externals
        metas = [externals[i].tensor for i in fn.program.metas]
        found = torch.autograd.grad([o.sum() for o in outs if o.requires_grad], metas, allow_unused=True)
    names = [fn.program.inputs[i].name for i in fn.program.metas]
    assert fn.report is not None
    return Called([o.detach() for o in outs], dict(zip(names, found, strict=True)), fn.report)


def measured(file: UserFile, options: dict[str, Any]) -> tuple[CompiledFunction, Measured]:
    """What a run measures, for the page: seconds of a warm call, then memory of one that is watched (and slower)."""
    fn = compile(**options)(subject(file)[0])
    _whole(fn, file)
    seconds = _whole(fn, file).stages
    with recording():
        memory = _whole(fn, file).measured.memory
    return fn, Measured(seconds, memory)


def _whole(fn: CompiledFunction, file: UserFile) -> Report:
    """A call and its gradient on arguments of its own: the call before drew from iterators and trained modules."""
    _, args, kwargs, _ = subject(file)
    with contextlib.redirect_stdout(sys.stderr):
        torch.autograd.backward([o.sum() for o in _tensors(fn(*args, **kwargs)) if o.requires_grad])
    assert fn.report is not None
    return fn.report


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
