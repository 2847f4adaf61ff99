"""What a call depends on: a walk over arguments, closures, and what the code that runs names.

The walk gives every reachable tensor a path (so that the same place is read by reference at the next call) and
collects what must be equal for a traced program to be used again: structure, Python scalars, flags, train/eval,
``requires_grad``, types of tensors.  Lists of batches contribute the structure of their items, not their length.

It follows code in one of two ways.  Before the first call nobody knows what will run, so every function, class and
module of the user's that can be named from ``fn`` is entered: enough to remember their objects.  Once a call has been
watched (:class:`~mlc.trace.python.reads.Reads`), only code that ran counts: the same places under the same paths,
fewer.
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from mlc.trace.python.batches import containers, is_batch_list, leaves, signature
from mlc.trace.python.follow import CALLABLES, Follower
from mlc.trace.python.found import Found
from mlc.trace.python.places import Path, Roots, Walk
from mlc.trace.python.view import View, digest_of_data, hooks_of_all_modules, is_opaque, value_of

__all__ = ["walk"]

_PLAIN = {int, float, bool, str, type(None)}
_HOOKS = (
    "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_non_persistent_buffers_set",
)  # fmt: skip
_SKIP_MODULE = {
    "training", "_parameters", "_buffers", "_modules", "_is_full_backward_hook", "_is_hf_initialized", *_HOOKS,
}  # fmt: skip
_SKIP_OPTIMIZER = {
    "param_groups", "state", "defaults", "_zero_grad_profile_name", "_patch_step_function", "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks",
    "_warned_capturable_if_run_uncaptured",
}  # fmt: skip
_DRAWING = ("sampler", "batch_sampler", "generator", "collate_fn", "worker_init_fn")
_LONG = 32  # entries from which on a list of plain values is one entry of the key


class Walker(Walk):
    """One walk: what each kind of object contributes. Code is followed by :class:`mlc.trace.python.follow.Follower`."""

    def __init__(self, found: Found | None, view: View) -> None:
        super().__init__(view)
        self.follow = Follower(self, found)

    def dispatch(self, x: object, path: Path, depth: int) -> None:
        """By kind."""
        if isinstance(x, nn.Module):
            self.module(x, path, depth)
        elif isinstance(x, torch.optim.Optimizer):
            self.optimizer(x, path, depth)
        elif isinstance(x, LRScheduler):
            self.r.schedulers[path] = x
            self.note(path, type(x))
            self.fields(x, path, depth)
        elif isinstance(x, DataLoader):
            self.loader(x, path, depth)
        elif isinstance(x, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            self.r.objects[path] = x
            self.note(path, type(x))
        elif isinstance(x, (dict, types.MappingProxyType)):
            self.mapping(x, path, depth)
        elif isinstance(x, (list, tuple, deque)):
            self.sequence(x, path, depth)
        elif isinstance(x, (set, frozenset, bytearray)):
            self.plain_body(x, path)
        elif isinstance(x, np.ndarray):
            self.r.arrays[path] = x
            self.note(path, type(x), x.shape, x.strides, str(x.dtype), self.view.digest(x))
        elif isinstance(x, np.generic):
            self.note(path, type(x), x.tobytes())
        elif isinstance(x, types.ModuleType):
            self.note(path, id(x))
            self.follow.module(x, depth)
        elif isinstance(x, type):
            self.note(path, id(x))
            self.follow.cls(x, path, depth)
        elif isinstance(x, CALLABLES):
            self.follow.callable(x, path, depth)
        else:
            self.other(x, path, depth)

    def tensor(self, t: Tensor, path: Path, depth: int) -> None:
        """A tensor: by reference; its type and flags are part of the key, and its backward hooks are followed."""
        first = self.r.tensors.get(id(t))
        if first is not None:
            self.note(path, first)
            return
        self.know(t, path)
        kind, requires_grad, leaf, grad = self.view.facts(t)
        self.note(path, kind or type(t), requires_grad, leaf)
        if grad is not None and id(grad) not in self.r.tensors:
            self.know(grad, (*path, ".grad"))
        for kind, hooks in enumerate(self.view.hooks(t)):
            for i, (_, f) in enumerate(hooks or ()):
                self.visit(f, (*path, ".hooks", kind, i), depth + 1)

    def module(self, m: nn.Module, path: Path, depth: int) -> None:
        """A module: parameters, buffers, children, then what else it has; hooks that run."""
        self.r.modules[path] = m
        fields = self.view.attrs(m)
        self.note(path, type(m))
        self.note((*path, "training"), fields.get("training", False))
        for part in ("_parameters", "_buffers", "_modules"):
            table = fields.get(part)
            if not isinstance(table, dict):
                continue
            self.hold(table, (*path, "." + part))
            for n, v in list(self.view.body(table).items()):
                self.visit(v, (*path, n), depth)
        for hooks in _HOOKS:
            table = fields.get(hooks)
            if isinstance(table, (dict, set)):
                self.hold(table, (*path, "." + hooks))
                if isinstance(table, dict) and table:
                    self.note(path, hooks, len(self.view.body(table)))
                    for i, v in enumerate(list(self.view.body(table).values())):
                        self.visit(v, (*path, "." + hooks, i), depth)
        self.named({k: v for k, v in fields.items() if k not in _SKIP_MODULE}, path, depth)
        self.follow.of(m, path, depth)

    def optimizer(self, o: torch.optim.Optimizer, path: Path, depth: int) -> None:
        """An optimizer: groups, state, and what else a wrapper has (the optimizer inside it)."""
        self.r.optimizers[path] = o
        fields = self.view.attrs(o)
        self.note(path, type(o))
        self.named({k: v for k, v in fields.items() if k not in _SKIP_OPTIMIZER}, path, depth)
        groups, state = fields.get("param_groups", ()), fields.get("state", {})
        if isinstance(state, dict):
            self.hold(state, (*path, ".state"))
        self.hold(groups, (*path, ".param_groups"))
        for i, g in enumerate(self.view.body(groups)):
            known = id(g) in self.r.paths
            self.hold(g, (*path, ".param_groups", i))
            if known:
                continue
            entries = self.view.body(g)
            for k, v in entries.items():
                self.visit(v, (*path, "param_groups", i, k), depth)
            for j, p in enumerate(self.view.body(entries.get("params", ()))):
                self.state(self.view.body(state), p, (*path, "state", (i, j)), depth)
        self.follow.of(o, path, depth)

    def state(self, state: object, p: object, path: Path, depth: int) -> None:
        """What an optimizer keeps for one parameter."""
        held = state.get(p) if isinstance(state, dict) else None
        if isinstance(held, dict) and id(held) not in self.r.paths:
            self.hold(held, path)
            for k, v in list(self.view.body(held).items()):
                self.visit(v, (*path, k), depth)

    def loader(self, x: object, path: Path, depth: int) -> None:
        """A loader is drawn from anew at every call: what it draws with is found, but does not count."""
        self.r.loaders[id(x)] = path
        self.r.objects[path] = x
        self.r.drawing.add(id(x))
        fields = self.view.attrs(x)
        self.note(path, type(x), fields.get("batch_size"), fields.get("drop_last"))
        self.visit(fields.get("dataset"), (*path, "dataset"), depth)
        self.quiet += 1
        self.named({k: v for k, v in fields.items() if k in _DRAWING}, path, depth)
        self.quiet -= 1

    def fields(self, x: object, path: Path, depth: int) -> None:
        """All attributes of an object, and those of its class that are read."""
        self.named(self.view.attrs(x), path, depth)
        self.follow.of(x, path, depth)

    def plain_body(self, x: object, path: Path) -> None:
        """A set or bytes: as a whole where all in it are plain values, else its size."""
        body = self.view.body(x)
        plain = isinstance(x, bytearray) or all(type(v) in _PLAIN for v in body)
        self.note(path, type(x), (bytes(body) if isinstance(x, bytearray) else frozenset(body)) if plain else len(body))

    def mapping(self, d: object, path: Path, depth: int) -> None:
        """A dict; a long one of plain values is one entry."""
        body = self.view.body(d)
        values = list(body.items())
        if len(values) >= _LONG and all(type(k) in _PLAIN and type(v) in _PLAIN for k, v in values):
            self.note(path, type(d), tuple(values))
            return
        self.note(path, type(d), len(values))
        for i, (k, v) in enumerate(values):
            name = k if isinstance(k, (str, int, float, bool, tuple)) else f"#{i}"
            if isinstance(k, Tensor):
                self.visit(k, (*path, f"#key {i}"), depth)
            self.visit(v, (*path, name), depth)
        self.extra(d, path, depth)

    def sequence(self, s: object, path: Path, depth: int) -> None:
        """A list, tuple or deque; batches of one structure count without their number."""
        body = list(self.view.body(s))
        if (
            body
            and isinstance(s, (list, tuple))
            and not self.quiet
            and path not in self.follow.changed
            and is_batch_list(body if type(s) is not tuple else s, self.view)
        ):
            self.r.batches[path] = s
            self.note(path, "batches", type(s), signature(body[0], self.view))
            for i, v in enumerate(body):
                for place, part in containers(v, (*path, i)):
                    self.hold(part, place)
                for leaf, t in leaves(v, (*path, i)):
                    if id(t) not in self.r.tensors:
                        self.know(t, leaf)
            return
        data = digest_of_data(body)
        if data is not None:
            self.note(path, type(s), len(body), data)
            return
        if len(body) >= _LONG and all(type(v) in _PLAIN for v in body):
            self.note(path, type(s), tuple(body))
            return
        self.note(path, type(s), len(body))
        for i, v in enumerate(body):
            self.visit(v, (*path, i), depth)
        self.extra(s, path, depth)

    def extra(self, x: object, path: Path, depth: int) -> None:
        """Attributes of containers of a class of their own."""
        if type(x).__module__ not in ("builtins", "collections"):
            self.fields(x, path, depth)

    def other(self, x: object, path: Path, depth: int) -> None:
        """Any other object: an iterator, one of the user's or a library's with attributes, or one left alone."""
        cls = type(x)
        wrapped = getattr(x, "fn", None) if cls.__module__.startswith("mlc.") else None
        if callable(wrapped):
            self.note(path, cls)
            self.visit(wrapped, (*path, "fn"), depth)
        elif hasattr(cls, "__next__") and not (cls.__module__ or "").startswith(("_io", "io", "tempfile")):
            self.note(path, "iterator")
            if not self.quiet:
                self.r.iterators[path] = x
                self.r.drawing.add(id(x))
            self.quiet += 1
            if not is_opaque(x):
                self.fields(x, path, depth)
            self.quiet -= 1
        elif is_opaque(x):
            self.note(path, cls, value_of(x))
            self.follow.opaque(x, path, depth)
        else:
            self.note(path, cls)
            self.r.objects[path] = x
            self.fields(x, path, depth)


def walk(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    extra: Found | None = None,
    before: View | None = None,
) -> Roots:
    """Walk everything a call of ``fn`` can reach.

    Args:
        fn: The function that is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        extra: What a watched call really ran; only the globals, cells and class attributes that this code names are
            followed. None: those of all code of the user's that can be named from ``fn``.
        before: A :class:`.world.World`, to walk objects as they were when it was made. None: as they are.
    """
    w = Walker(extra, before or View())
    for i, a in enumerate(args):
        w.visit(a, ("args", i))
    for k, v in kwargs.items():
        w.visit(v, ("args", k))
    w.visit(fn, ("fn",))
    for place, hook in hooks_of_all_modules():
        w.visit(hook, ("hooks", *place))
    w.follow.rest()
    w.note(("grad",), torch.is_grad_enabled(), torch.get_default_dtype())
    return w.r
