"""Bringing the user's objects to the state in which their loop would have left them, once a call has succeeded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.trace.capture import Effect, Ref
from mlc.trace.inputs import Path, Roots

__all__ = ["commit", "storages"]


def _owner(owner: Any, path: Path | None, roots: Roots) -> Any:
    if path is None:
        return owner
    for table in (roots.at, roots.optimizers, roots.schedulers, roots.modules):
        found = table.get(path)
        if found is not None:
            return found
    return owner


def _value(x: Any, results: Sequence[Any]) -> Any:
    if isinstance(x, Ref):
        v = results[x.index]
        return v.item() if x.number else v
    if isinstance(x, dict):
        return {k: _value(v, results) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_value(v, results) for v in x)
    return x


def storages(values: Any) -> set[int]:
    """Identities of the memories behind tensors in nested lists."""
    if isinstance(values, Tensor):
        return {values.untyped_storage()._cdata}
    out: set[int] = set()
    if isinstance(values, (list, tuple)):
        for v in values:
            out |= storages(v)
    return out


def commit(effects: Sequence[Effect], results: Sequence[Any], roots: Roots, kept: set[int]) -> None:
    """Apply the effects of a call.

    Args:
        effects: What to change.
        results: Results of the program.
        roots: The walk of this call.
        kept: Memories that the backward stage still reads; the user gets copies of those.
    """
    owned = set(kept)
    with torch.no_grad():
        for e in effects:
            target = _owner(e.owner, e.path, roots)
            value = _value(e.value, results)
            if e.kind == "copy":
                target.copy_(value)
                continue
            value = _own(value, owned)
            if e.kind == "data":
                target.data = value
            elif e.kind == "grad":
                target.grad = value
            elif e.kind == "attr":
                vars(target)[e.key] = value
            elif e.kind == "buffers":
                target._buffers[e.key] = value
            elif e.kind == "group":
                target.param_groups[e.key[0]][e.key[1]] = value
            elif e.kind == "state":
                p = roots.at.get(e.key_path, e.key[0]) if e.key_path is not None else e.key[0]
                target.state[p][e.key[1]] = value


def _own(value: Any, owned: set[int]) -> Any:
    """A tensor of the user's own: never memory shared with another of their tensors."""
    if not isinstance(value, Tensor):
        return value
    key = value.untyped_storage()._cdata
    if key in owned or not value.is_contiguous() or value.storage_offset() != 0:
        return value.clone(memory_format=torch.contiguous_format)
    owned.add(key)
    return value
