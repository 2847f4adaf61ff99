"""Places: where everything stands that a call can reach, as a walk notes it down.

A place has a path: the argument, global, cell or attribute that leads to it, and the steps from there. Later calls read
by reference what stands at the same path then.
"""

from __future__ import annotations

import enum
import functools
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlc.trace.python.view import View

__all__ = ["Path", "Roots", "Walk"]

Path = tuple[Any, ...]
_ATOMS = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, enum.Enum, torch.Size,
          range, slice, torch.layout, torch.memory_format)  # fmt: skip
_DEPTH = 40


@dataclass
class Roots:
    """Result of a walk.

    Attributes:
        tensors: Path of every tensor (the first found, by identity).
        at: Tensor by path.
        key: What must be equal for a program to be used again: ``(path, *facts)``.
        batches: Lists and tuples of batches by path.
        iterators: Iterators by path, wherever they are.
        loaders: Path of every ``DataLoader`` by identity.
        objects: Loaders, generators and other objects by path.
        optimizers: Optimizers by path.
        schedulers: Learning-rate schedulers by path.
        modules: Modules by path.
        volatile: Python scalars by path.
        places: Every object with an identity by its (first) path.
        paths: The reverse of ``places`` and ``at``, by identity.
        visited: Every mutable object found, with its path; what a world remembers.
        bindings: Globals, cells and class attributes that were read: ``(path, owner, name)``.
        arrays: NumPy arrays by path.
        drawing: Identities of objects that only data is drawn with (samplers, what iterators hold).
        keep: What must stay alive so that identities mean something.
        drawn: Items taken from iterators, which must come first when these are drawn from again, by path.
    """

    tensors: dict[int, Path] = field(default_factory=dict)
    at: dict[Path, Tensor] = field(default_factory=dict)
    key: list[Any] = field(default_factory=list)
    batches: dict[Path, Any] = field(default_factory=dict)
    iterators: dict[Path, Any] = field(default_factory=dict)
    loaders: dict[int, Path] = field(default_factory=dict)
    objects: dict[Path, Any] = field(default_factory=dict)
    optimizers: dict[Path, torch.optim.Optimizer] = field(default_factory=dict)
    schedulers: dict[Path, Any] = field(default_factory=dict)
    modules: dict[Path, nn.Module] = field(default_factory=dict)
    volatile: dict[Path, Any] = field(default_factory=dict)
    places: dict[Path, Any] = field(default_factory=dict)
    paths: dict[int, Path] = field(default_factory=dict)
    visited: list[tuple[Path, Any]] = field(default_factory=list)
    bindings: list[tuple[Path, Any, str]] = field(default_factory=list)
    arrays: dict[Path, Any] = field(default_factory=dict)
    drawing: set[int] = field(default_factory=set)
    keep: list[Any] = field(default_factory=list)
    drawn: dict[Path, list[Any]] = field(default_factory=dict)

    @functools.cached_property
    def shared(self) -> dict[int, list[Path]]:
        """Paths of the tensors that lie in one memory, by the memory's identity (asked for when recording only)."""
        out: dict[int, list[Path]] = {}
        for path, t in self.at.items():
            if t.layout is torch.strided and type(t) in (Tensor, nn.Parameter):
                out.setdefault(t.untyped_storage()._cdata, []).append(path)
        return out


class Walk(ABC):
    """A walk that notes what it finds; what each kind of object contributes is for subclasses to say.

    Args:
        view: How objects are looked at: as they are, or as they were.
    """

    def __init__(self, view: View) -> None:
        self.r = Roots()
        self.view = view
        self.quiet = 0  # above 0: found, but no part of the key

    @abstractmethod
    def dispatch(self, x: object, path: Path, depth: int) -> None:
        """Enter an object met for the first time."""

    @abstractmethod
    def tensor(self, t: Tensor, path: Path, depth: int) -> None:
        """Enter a tensor."""

    def note(self, *what: object) -> None:
        """An entry of the key: a path and what must be equal there."""
        if not self.quiet:
            self.r.key.append(what)

    def hold(self, x: object, path: Path) -> None:
        """A mutable object is at a path: to be remembered, and found again when something in it is to be changed."""
        if id(x) not in self.r.paths:
            self.r.paths[id(x)] = path
            self.r.places[path] = x
            self.r.visited.append((path, x))
            if self.quiet:
                self.r.drawing.add(id(x))
            self.r.keep.append(x)

    def visit(self, x: object, path: Path, depth: int = 0) -> None:
        """Enter whatever is at a path."""
        if isinstance(x, Tensor):
            self.tensor(x, path, depth)
        elif isinstance(x, _ATOMS):
            self.note(path, type(x), x)
            if type(x) in (int, float, bool, str):
                self.r.volatile[path] = x
        elif id(x) in self.r.paths:
            self.note(path, self.r.paths[id(x)])
        elif depth > _DEPTH:
            self.note(path, id(x))
            self.r.keep.append(x)
        else:
            if not isinstance(x, (types.ModuleType, tuple, type)):
                self.hold(x, path)
            else:
                self.r.paths[id(x)] = path
                self.r.places[path] = x
                self.r.keep.append(x)
            self.dispatch(x, path, depth + 1)

    def know(self, t: Tensor, path: Path) -> None:
        """A tensor is at a path."""
        self.r.keep.append(t)
        self.r.tensors[id(t)] = self.r.paths[id(t)] = path
        self.r.at[path] = t

    def named(self, fields: dict[str, Any], path: Path, depth: int) -> None:
        """Attributes by name."""
        for k, v in list(fields.items()):
            self.visit(v, (*path, "." + str(k)), depth)
