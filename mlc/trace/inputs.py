"""What a call depends on: a walk over arguments, closures and globals.

The walk gives every reachable tensor a path (so that the same place is read by reference at the next call) and
collects what must be equal for a traced program to be used again: structure, Python scalars, flags, train/eval,
``requires_grad``, types of tensors.  Lists of batches contribute the structure of their items, not their length.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from mlc.ir.types import TensorType
from mlc.trace.frames import is_user_code

__all__ = ["Path", "Roots", "walk"]

Path = tuple[Any, ...]
_ATOMS = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, enum.Enum, torch.Size)
_SKIP_MODULE = {
    "training", "_parameters", "_buffers", "_modules", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_non_persistent_buffers_set", "_is_full_backward_hook", "_is_hf_initialized",
}  # fmt: skip
_DEPTH = 24


@dataclass
class Roots:
    """Result of a walk.

    Attributes:
        tensors: Path of every tensor (the first found, by identity).
        at: Tensor by path.
        key: What must be equal for a program to be used again.
        batches: Lists and tuples of batches by path.
        iterators: Iterators and loaders by path, with a function that puts another object there.
        cells: Containers whose entries may be rebound by the call: ``(path, container)``.
        scalars: Mutable Python scalars ``path -> (owner, name, value)`` of optimizers, schedulers, modules, objects.
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
    drawn: dict[Path, list[Any]] = field(default_factory=dict)


class _Walker:
    def __init__(self) -> None:
        self.r = Roots()
        self.seen: dict[int, Path] = {}
        self.keep: list[Any] = []

    def note(self, *what: Any) -> None:
        self.r.key.append(what)

    def visit(self, x: Any, path: Path, depth: int = 0) -> None:
        if isinstance(x, Tensor):
            self.tensor(x, path)
            return
        if isinstance(x, _ATOMS):
            self.note(path, type(x), x)
            if type(x) in (int, float, bool, str):
                self.r.volatile[path] = x
            return
        if isinstance(x, (types.ModuleType, type)) or depth > _DEPTH:
            self.note(path, id(x))
            return
        if id(x) in self.seen:
            self.note(path, self.seen[id(x)])
            return
        self.seen[id(x)] = path
        self.keep.append(x)
        self.dispatch(x, path, depth + 1)

    def dispatch(self, x: Any, path: Path, depth: int) -> None:
        if isinstance(x, nn.Module):
            self.module(x, path, depth)
        elif isinstance(x, torch.optim.Optimizer):
            self.optimizer(x, path, depth)
        elif isinstance(x, LRScheduler):
            self.r.schedulers[path] = x
            self.note(path, type(x))
            self.fields(vars(x), path, depth)
        elif isinstance(x, DataLoader):
            self.r.loaders[id(x)] = path
            self.r.objects[path] = x
            self.note(path, type(x), x.batch_size, x.drop_last)
            self.visit(x.dataset, (*path, "dataset"), depth)
        elif isinstance(x, torch.Generator):
            self.r.objects[path] = x
            self.note(path, torch.Generator)
        elif isinstance(x, dict):
            self.mapping(x, path, depth)
        elif isinstance(x, (list, tuple)):
            self.sequence(x, path, depth)
        elif isinstance(x, (set, frozenset)):
            self.note(path, type(x), len(x))
        elif isinstance(x, (types.FunctionType, types.MethodType)):
            self.function(x, path, depth)
        elif hasattr(x, "__next__"):
            self.r.iterators[path] = x
            self.note(path, "iterator")
        else:
            self.other(x, path, depth)

    def tensor(self, t: Tensor, path: Path) -> None:
        first = self.r.tensors.get(id(t))
        if first is not None:
            self.note(path, first)
            return
        self.keep.append(t)
        self.r.tensors[id(t)] = path
        self.r.at[path] = t
        if t.layout is torch.strided:
            self.note(path, TensorType.of(t), t.requires_grad, t.is_leaf)
        if t.is_leaf:
            g = t.grad
            if g is not None:
                self.r.tensors.setdefault(id(g), (*path, ".grad"))
                self.r.at[(*path, ".grad")] = g
                self.keep.append(g)

    def module(self, m: nn.Module, path: Path, depth: int) -> None:
        self.r.modules[path] = m
        self.note(path, type(m))
        self.note((*path, "training"), m.training)
        for n, p in m._parameters.items():
            self.visit(p, (*path, n), depth)
        for n, buffer in m._buffers.items():
            self.visit(buffer, (*path, n), depth)
        for n, c in m._modules.items():
            self.visit(c, (*path, n), depth)
        self.fields({k: v for k, v in vars(m).items() if k not in _SKIP_MODULE}, path, depth)

    def optimizer(self, o: torch.optim.Optimizer, path: Path, depth: int) -> None:
        self.r.optimizers[path] = o
        self.note(path, type(o))
        for i, g in enumerate(o.param_groups):
            for k, v in g.items():
                self.visit(v, (*path, "param_groups", i, k), depth)
            for j, p in enumerate(g["params"]):
                for k, v in o.state.get(p, {}).items():
                    self.visit(v, (*path, "state", (i, j), k), depth)

    def fields(self, d: dict[str, Any], path: Path, depth: int) -> None:
        for k, v in d.items():
            self.visit(v, (*path, "." + str(k)), depth)

    def mapping(self, d: Any, path: Path, depth: int) -> None:
        self.note(path, type(d), len(d))
        for k, v in list(d.items()):
            name = k if isinstance(k, (str, int, float, bool, tuple)) else f"#{len(self.seen)}"
            self.visit(v, (*path, name), depth)

    def sequence(self, s: Any, path: Path, depth: int) -> None:
        if len(s) and _is_batch_list(s):
            self.r.batches[path] = s
            self.note(path, "batches", type(s), _signature(s[0]))
            for i, v in enumerate(s):
                for leaf, t in _leaves(v, (*path, i)):
                    if id(t) not in self.r.tensors:
                        self.r.tensors[id(t)] = leaf
                        self.r.at[leaf] = t
                        self.keep.append(t)
            return
        self.note(path, type(s), len(s))
        for i, v in enumerate(s):
            self.visit(v, (*path, i), depth)

    def function(self, f: Any, path: Path, depth: int) -> None:
        if isinstance(f, types.MethodType):
            self.visit(f.__self__, (*path, "self"), depth)
            f = f.__func__
        if not isinstance(f, types.FunctionType) or not is_user_code(f.__code__):
            self.note(path, id(f))
            return
        self.note(path, id(f.__code__))
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            self.visit(value, (*path, "closure", name), depth)
        for name in sorted(_global_names(f.__code__)):
            if name in f.__globals__:
                self.visit(f.__globals__[name], ("globals", f.__module__, name), depth)
        for i, v in enumerate(f.__defaults__ or ()):
            self.visit(v, (*path, "default", i), depth)
        for k, v in (f.__kwdefaults__ or {}).items():
            self.visit(v, (*path, "default", k), depth)

    def other(self, x: Any, path: Path, depth: int) -> None:
        cls = type(x)
        self.note(path, cls)
        if cls.__module__ == "numpy":
            data = getattr(x, "tobytes", None)
            self.note(path, getattr(x, "shape", ()), hash(data()) if data else id(x))
            return
        wrapped = getattr(x, "fn", None)
        if cls.__module__.startswith("mlc.") and callable(wrapped):
            self.visit(wrapped, (*path, "fn"), depth)
            return
        fields = getattr(x, "__dict__", None)
        if isinstance(fields, dict) and not cls.__module__.startswith(("torch._", "torch.autograd", "torch.backends")):
            self.r.objects[path] = x
            self.fields(dict(fields), path, depth)
        for name in getattr(cls, "__slots__", ()):
            if isinstance(name, str) and hasattr(x, name) and not name.startswith("__"):
                self.visit(getattr(x, name), (*path, "." + name), depth)


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            names |= _global_names(c)
    return names


def _leaves(x: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(x, Tensor):
        yield path, x
    elif isinstance(x, (list, tuple)):
        for i, v in enumerate(x):
            yield from _leaves(v, (*path, i))
    elif isinstance(x, dict):
        for k, v in x.items():
            yield from _leaves(v, (*path, k))
    elif hasattr(x, "__dict__") and not callable(x):
        for k, v in vars(x).items():
            yield from _leaves(v, (*path, "." + k))


def _signature(x: Any) -> Any:
    """Structure of a batch: containers and types of tensors; None when it holds anything else."""
    if isinstance(x, Tensor):
        return None if x.requires_grad or isinstance(x, nn.Parameter) else (TensorType.of(x),)
    if isinstance(x, (list, tuple)) and x:
        parts = [_signature(v) for v in x]
        return None if None in parts else (type(x), *parts)
    if isinstance(x, dict) and x:
        items = [(k, _signature(v)) for k, v in x.items()]
        return None if any(s is None for _, s in items) else (dict, *items)
    if hasattr(x, "__dataclass_fields__"):
        items = [(k, _signature(v)) for k, v in vars(x).items()]
        return None if any(s is None for _, s in items) else (type(x), *items)
    return None


def _is_batch_list(s: Any) -> bool:
    if isinstance(s, tuple) and isinstance(s[0], Tensor):
        return False
    first = _signature(s[0])
    return first is not None and all(_signature(v) == first for v in s[1:])


def walk(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Roots:
    """Walk everything a call of ``fn`` can reach."""
    w = _Walker()
    for i, a in enumerate(args):
        w.visit(a, ("args", i))
    for k, v in kwargs.items():
        w.visit(v, ("args", k))
    w.visit(fn, ("fn",))
    w.note("grad", torch.is_grad_enabled(), torch.get_default_dtype())
    w.r.keep = w.keep  # type: ignore[attr-defined]
    return w.r
