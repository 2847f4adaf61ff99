"""Values that are known while tracing: results of literals and of small tensors from outside.

A branch on a hyperparameter, an optimizer's step count, a buffer that counts: their value follows from what is there
before the call.  It is computed for real, the branch is taken, and a guard makes sure at later calls that the outcome
is still the same (otherwise the function is traced again).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mlc.ir.builder import Builder
from mlc.ir.core import Alias, Eqn, Grad, Primitive, SafeSqrt, Stop, Var, map_vars
from mlc.ir.types import TensorType
from mlc.trace.recorder.externals import External

__all__ = ["Guard", "Known", "concrete"]

_MAX_EQUATIONS = 400
_MAX_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Known:
    """A value, the equations it follows from and the tensors from outside among its inputs."""

    value: Any
    var: Var
    eqns: tuple[Eqn, ...]
    externals: tuple[External, ...]


@dataclass(frozen=True)
class Guard:
    """A decision that was taken while tracing: it holds as long as recomputing it gives the same outcome."""

    var: Var
    eqns: tuple[Eqn, ...]
    externals: tuple[External, ...]
    kind: Callable[[Any], Any]
    outcome: Any

    def holds(self, read: Callable[[External], Tensor]) -> bool:
        """Whether the outcome is the same with the tensors that are there now."""
        value = _run(self.eqns, {x.var: read(x) for x in self.externals}, self.var)
        return bool(self.kind(value) == self.outcome)


def concrete(var: Var, externals: Iterable[External], builder: Builder) -> Known | None:
    """The value of a one-element tensor, if it follows from literals and small tensors from outside.

    Args:
        var: Its value in the recording.
        externals: Tensors from outside.
        builder: The recording.
    """
    outside = {x.var: x for x in externals}
    eqns: dict[int, Eqn] = {}
    used: dict[Var, External] = {}
    todo = [var]
    while todo:
        v = todo.pop()
        ext = outside.get(v)
        if ext is not None:
            if ext.tensor.numel() > _MAX_ELEMENTS:
                return None
            used[v] = ext
            continue
        e = builder.producer(v)
        if e is None or not _simple(e) or len(eqns) > _MAX_EQUATIONS:
            return None
        where = builder.position[v]
        if where not in eqns:
            eqns[where] = e
            todo.extend(e.inputs)
    order = tuple(eqns[i] for i in sorted(eqns))
    value = _run(order, {v: x.tensor for v, x in used.items()}, var)
    return Known(value, var, order, tuple(used.values()))


def _simple(e: Eqn) -> bool:
    if e.impure or isinstance(e.op, Grad):
        return False
    if isinstance(e.op, Primitive) and not isinstance(e.op, (Alias, Stop, SafeSqrt)):
        return False
    return all(not isinstance(v.type, TensorType) or v.type.numel <= _MAX_ELEMENTS for v in e.outs)


def _run(eqns: Sequence[Eqn], values: Mapping[Var, Tensor], result: Var) -> Any:
    env = dict(values)
    with _disable_current_modes(), torch.no_grad():
        for e in eqns:
            args = map_vars(e.args, env.__getitem__)
            if isinstance(e.op, (Alias, Stop)):
                env[e.outs[0]] = args[0]
                continue
            op: Any = torch.sqrt if isinstance(e.op, SafeSqrt) else e.op
            out = op(*args, **{k: map_vars(v, env.__getitem__) for k, v in e.kwargs})
            env.update(zip(e.outs, [out] if isinstance(out, Tensor) else out, strict=False))
        # TensorBase.item: Tensor.item is replaced while tracing
        return torch._C.TensorBase.item(env[result].detach())
