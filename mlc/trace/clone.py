"""Differentiable copies of modules."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from mlc.trace.recorder.tracer import Tracer

__all__ = ["clone"]

M = TypeVar("M", bound=nn.Module)


def clone(module: M) -> M:
    """A copy of ``module`` to adapt (MAML fast weights): its parameters start at the module's, differentiably.

    Inside a compiled function the copy's parameters are leaves that an optimizer can train; the derivative flows
    from their initial values back to the parameters of ``module`` (Finn et al. 2017).  Buffers are copied.  Outside
    of one it is an ordinary deep copy.

    Args:
        module: Any module; it is not changed.

    Returns:
        A module of the same class with the same structure (tied parameters stay tied).
    """
    tracer = Tracer.current
    memo: dict[int, object] = {}
    seen: set[int] = set()
    for t in [*module.parameters(), *module.buffers()]:
        if id(t) in seen:
            continue
        seen.add(id(t))
        memo[id(t)] = _copy(t, tracer)
    return copy.deepcopy(module, memo)


def _copy(t: torch.Tensor, tracer: Tracer | None) -> torch.Tensor:
    is_parameter = isinstance(t, nn.Parameter)
    if tracer is None:
        new = t.detach().clone()
        return nn.Parameter(new, t.requires_grad) if is_parameter else new
    return tracer.leaf_copy(t, is_parameter)
