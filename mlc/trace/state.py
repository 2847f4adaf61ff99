"""The user's objects before and after: watched while tracing, put back, and brought to their final state on success."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from mlc.trace.inputs import Path, Roots

__all__ = ["Change", "Watch"]

_MISSING = object()


@dataclass
class Change:
    """One entry that the loop rebinds: ``owner[kind][key] = value``; ``value`` may hold traced tensors.

    ``kind`` is ``"attr"`` (an attribute), ``"buffers"``, ``"group"`` (key is (index, name)) or ``"state"``
    (key is (parameter, name)).
    """

    owner: Any
    path: Path | None
    kind: str
    key: Any
    value: Any


class Watch:
    """Shallow copies of what a loop may rebind in modules, optimizers and schedulers."""

    def __init__(self, roots: Roots) -> None:
        self._optimizers = [(o, p, *_copy_optimizer(o)) for p, o in roots.optimizers.items()]
        self._known = {id(o) for o, *_ in self._optimizers}
        self._modules = [(m, p, dict(vars(m)), dict(m._buffers), dict(m._parameters)) for p, m in roots.modules.items()]
        self._schedulers = [(s, p, dict(vars(s))) for p, s in roots.schedulers.items()]

    def optimizer(self, o: torch.optim.Optimizer) -> None:
        """Watch an optimizer met on the way (before its first recorded step)."""
        if id(o) not in self._known:
            self._known.add(id(o))

    def changes(self) -> list[Change]:
        """What differs now."""
        out: list[Change] = []
        for o, path, groups, state in self._optimizers:
            for i, (g, old) in enumerate(zip(o.param_groups, groups, strict=False)):
                out += [
                    Change(o, path, "group", (i, k), v) for k, v in g.items() if k != "params" and v is not old.get(k)
                ]
            for p, entries in o.state.items():
                before = state.get(p, {})
                out += [
                    Change(o, path, "state", (p, k), v) for k, v in entries.items() if v is not before.get(k, _MISSING)
                ]
        for m, path, attrs, buffers, _ in self._modules:
            out += [
                Change(m, path, "buffers", k, v) for k, v in m._buffers.items() if v is not buffers.get(k, _MISSING)
            ]
            out += [
                Change(m, path, "attr", k, v) for k, v in vars(m).items()
                if v is not attrs.get(k, _MISSING) and (isinstance(v, torch.Tensor) or k == "training")
            ]  # fmt: skip
        for s, path, attrs in self._schedulers:
            out += [Change(s, path, "attr", k, v) for k, v in vars(s).items() if v is not attrs.get(k, _MISSING)]
        return [c for c in out if not isinstance(c.value, (torch.optim.Optimizer, LRScheduler, nn.Module))]

    def restore(self) -> None:
        """Put everything back as it was."""
        for o, _, groups, state in self._optimizers:
            for g, old in zip(o.param_groups, groups, strict=False):
                g.clear()
                g.update(old)
            o.state.clear()
            for p, entries in state.items():
                o.state[p] = dict(entries)
        for m, _, attrs, buffers, params in self._modules:
            m._buffers.clear()
            m._buffers.update(buffers)
            m._parameters.clear()
            m._parameters.update(params)
            for k in [k for k in vars(m) if k not in attrs]:
                del vars(m)[k]
            vars(m).update({k: v for k, v in attrs.items() if k not in ("_buffers", "_parameters")})
        for s, _, attrs in self._schedulers:
            vars(s).clear()
            vars(s).update(attrs)


def _copy_optimizer(o: torch.optim.Optimizer) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    return [dict(g) for g in o.param_groups], {p: dict(s) for p, s in o.state.items()}
