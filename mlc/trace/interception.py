"""What is replaced in torch while the user's function really runs, and put back afterwards.

Almost everything is PyTorch's own.  Only what does not pass the dispatcher is looked at here: gradients, reads of
``.grad``, numbers that Python takes in bulk, hooks, optimizer steps, seeds.  Other threads keep the original.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import BackwardHook

from mlc.errors import CaptureError
from mlc.trace.communication.collectives import FUNCTIONAL, followed
from mlc.trace.communication.functions import MODULE, differentiable
from mlc.trace.communication.parallel import patches
from mlc.trace.customs import apply_custom
from mlc.trace.gradients.grads import get_grad, put_grad
from mlc.trace.gradients.hooks import Hooks
from mlc.trace.gradients.taken import Gradients
from mlc.trace.numbers.number import escape, numbers_of, take
from mlc.trace.optimizers import after_step, before_step
from mlc.trace.patches import replaced
from mlc.trace.recorder.observer import Observer
from mlc.trace.recorder.packed import packed

__all__ = ["intercepted"]

_BASE: Any = torch._C.TensorBase
Active = Callable[[], bool]


def running(observer: Observer) -> Active:
    """Whether the user's code runs on this thread, observed."""
    me = threading.get_ident()

    def active() -> bool:
        return threading.get_ident() == me and not observer.paused and torch._C._len_torch_dispatch_stack() > 0

    return active


def _engine(gradients: Gradients, active: Active) -> Any:
    original = gradients.original

    def run(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in outputs if isinstance(t, Tensor))
        if not active() or wrapped:
            return original(outputs, *args, **kwargs)
        return gradients.run(outputs, *args, **kwargs)

    return run


def _grad(ob: Observer, active: Active) -> property:
    def get(t: Tensor) -> Any:
        if active():
            ob.read_grad(t)
        return get_grad(t)

    def put(t: Tensor, value: Any) -> None:
        if active():
            ob.set_grad(t)
        put_grad(t, value)

    def drop(t: Tensor) -> None:
        put(t, None)

    return property(get, put, drop)


def _data(ob: Observer, active: Active) -> property:
    base = _BASE.data

    def get(t: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            d = base.__get__(t)
        if active() and t.layout is torch.strided and not torch.nn.parameter.is_lazy(t):
            ob.cut_tensors[d] = ob.cut_of(t) or ob.place()
        return d

    def put(t: Tensor, value: Tensor) -> None:
        if active() and t.layout is torch.strided and value.layout is torch.strided:
            ob.rebind(t, value)
        with torch._C.DisableTorchFunction():
            base.__set__(t, value)

    return property(get, put)


def _texts(ob: Observer, active: Active) -> Iterator[tuple[Any, str, Any]]:
    def quietly(original: Any) -> Any:
        def run(t: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not active():
                return original(t, *args, **kwargs)
            with ob.pause():
                return original(t, *args, **kwargs)

        return run

    yield Tensor, "__repr__", quietly(Tensor.__repr__)
    yield Tensor, "__format__", quietly(Tensor.__format__)


def _bulk(ob: Observer, active: Active) -> Iterator[tuple[Any, str, Any]]:
    """Values that leave for Python or NumPy: numbers that know where they come from, arrays to be found again."""

    def item(t: Tensor) -> Any:
        if not active() or t.layout is not torch.strided or t.numel() != 1:
            return _BASE.item(t)
        return take(t, ob)

    def tolist(t: Tensor) -> Any:
        return numbers_of(t, ob) if active() and t.layout is torch.strided else _BASE.tolist(t)

    def escaping(original: Any) -> Any:
        @functools.wraps(original)
        def run(t: Tensor, *args: Any, **kwargs: Any) -> Any:
            if active() and t.layout is torch.strided:
                ob.lent(t)
                escape(t, ob)
            return original(t, *args, **kwargs)

        return run

    yield Tensor, "item", item
    yield Tensor, "tolist", tolist
    yield Tensor, "numpy", escaping(_BASE.numpy)
    yield Tensor, "__array__", escaping(Tensor.__array__)


def _deepcopy(ob: Observer, active: Active) -> Any:
    original: Any = Tensor.__deepcopy__

    def copy(t: Tensor, memo: Any) -> Any:
        plain = type(t) in (Tensor, nn.Buffer) and t.is_leaf and t.layout is torch.strided
        if not active() or not plain or id(t) in memo:
            return original(t, memo)
        new = t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad)
        if vars(t):
            new.__dict__.update(vars(t))
        if isinstance(t, nn.Buffer):
            new = nn.Buffer(new, persistent=t.persistent)
        memo[id(t)] = new
        return new

    return copy


def _seed(ob: Observer, active: Active, original: Any) -> Any:
    def manual_seed(seed: Any) -> Any:
        out = original(seed)
        if active():
            ob.seed(int(seed))
            with ob.pause():
                ob.random.left(None)
        return out

    return manual_seed


def _recomputed(ob: Observer, active: Active) -> Iterator[tuple[Any, str, Any]]:
    """State that a checkpointed part changes, it changes once more in the backward pass."""
    module: Any = torch.utils.checkpoint
    original = module._checkpoint_without_reentrant_generator

    def run(function: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        first, writes, changes = len(ob.draws), ob.writes, False

        def again(*inputs: Any, **named: Any) -> Any:
            with ob.recomputing(first) if changes else contextlib.nullcontext():
                return function(*inputs, **named)

        inner = original(again if active() else function, *args, **kwargs)
        yield next(inner)
        changes = ob.writes != writes
        yield from inner

    yield module, "_checkpoint_without_reentrant_generator", run


def _reentrant(ob: Observer, function: Any, keeps: bool, *args: Any) -> Any:
    """``checkpoint(..., use_reentrant=True)``: as if it were not there, which only a function of its inputs allows."""
    writes, draws = ob.writes, len(ob.draws)
    out = function(*args)
    if ob.writes != writes or (len(ob.draws) != draws and not keeps):
        raise CaptureError(
            "a reentrant checkpoint changes state, and does it again in the backward pass",
            loc=ob.place(),
            advice="checkpoint(..., use_reentrant=False)",
        )
    return out


def _zero_grad(ob: Observer, active: Active) -> Iterator[tuple[Any, str, Any]]:
    """``zero_grad()`` is a statement about gradients, whatever they were."""

    def zero(original: Any, params: Callable[[Any], Iterator[Tensor]]) -> Any:
        def run(self: Any, set_to_none: bool = True) -> None:
            if active() and set_to_none:
                for p in params(self):
                    ob.set_grad(p)
            original(self, set_to_none)

        return run

    def of_optimizer(o: Any) -> Iterator[Tensor]:
        return (p for g in o.param_groups for p in g["params"])

    yield torch.optim.Optimizer, "zero_grad", zero(torch.optim.Optimizer.zero_grad, of_optimizer)
    yield nn.Module, "zero_grad", zero(nn.Module.zero_grad, lambda m: m.parameters())


def _lengths(ob: Observer, active: Active) -> Iterator[tuple[Any, str, Any]]:
    """``ctc_loss`` makes a tensor of lengths that are numbers where nobody sees what is in it: it gets one."""
    original = torch.ctc_loss

    def ctc(logp: Any, targets: Any, frames: Any, lengths: Any, *args: Any, **kwargs: Any) -> Any:
        if active():
            frames, lengths = (torch.tensor(x) if isinstance(x, (list, tuple)) else x for x in (frames, lengths))
        return original(logp, targets, frames, lengths, *args, **kwargs)

    yield torch, "ctc_loss", ctc


def _optimized(ob: Observer, active: Active) -> Iterator[tuple[Any, str, Any]]:
    """Which tensors an optimizer is made for."""
    original = torch.optim.Optimizer.add_param_group

    def add(self: Any, group: Any) -> None:
        original(self, group)
        if active():
            ob.optimized.update({id(p): p for p in self.param_groups[-1]["params"]})

    yield torch.optim.Optimizer, "add_param_group", add


def _retained(ob: Observer, active: Active) -> Iterator[tuple[Any, str, Any]]:
    original = _BASE.retain_grad

    def retain(t: Tensor) -> None:
        original(t)
        if active() and t.requires_grad and not t.is_leaf:
            ob.retained[t] = True

    yield Tensor, "retain_grad", retain


def _files(ob: Observer, active: Active) -> Iterator[tuple[Any, str, Any]]:
    """Files that the loop writes: only the loop itself writes them again."""

    def noting(original: Any, writes: Callable[..., bool]) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if active() and writes(*args, **kwargs):
                ob.files.append(ob.place())
            return original(*args, **kwargs)

        return call

    def to_write(file: object, mode: object = "r", *args: object, **kwargs: object) -> bool:
        return isinstance(mode, str) and bool(set(mode) & set("wax+"))

    def saves(obj: object, f: object, *args: object, **kwargs: object) -> bool:
        return isinstance(f, (str, os.PathLike))

    yield builtins, "open", noting(builtins.open, to_write)
    save = noting(torch.save, saves)
    yield torch, "save", save
    yield torch.serialization, "save", save


def _hooks(hooks: Hooks, active: Active) -> Iterator[tuple[Any, str, Any]]:
    """Backward hooks: see :mod:`mlc.trace.gradients.hooks`."""
    tensor: Any = Tensor

    def registering(original: Any, table: str) -> Any:
        @functools.wraps(original)
        def register(t: Tensor, hook: Any) -> Any:
            return hooks.register(t, hook, table) if active() else original(t, hook)

        return register

    yield Tensor, "register_hook", registering(tensor.register_hook, "_backward_hooks")
    after = tensor.register_post_accumulate_grad_hook
    yield Tensor, "register_post_accumulate_grad_hook", registering(after, "_post_accumulate_grad_hooks")
    put_node: Any = BackwardHook._apply_on_tensors

    def around(self: Any, fn: Any, args: Any) -> Any:
        if not active():
            return put_node(self, fn, args)
        users = [*self.user_hooks, *self.user_pre_hooks]
        return put_node(self, lambda node: fn(hooks.node(node, users)), args)

    yield BackwardHook, "_apply_on_tensors", around
    old: Any = nn.Module._maybe_warn_non_full_backward_hook

    def refuse(self: nn.Module, *args: object) -> Any:
        if active():
            raise hooks.refused(
                "is one of the old kind, put on a module by register_backward_hook",
                "use register_full_backward_hook instead",
            )
        return old(self, *args)

    yield nn.Module, "_maybe_warn_non_full_backward_hook", refuse


@contextlib.contextmanager
def intercepted(ob: Observer) -> Iterator[tuple[Active, Gradients]]:
    """Install the replacements for the time of a run; whether its code runs, and its gradients."""
    active = running(ob)
    gradients = Gradients(ob, torch.autograd._engine_run_backward)  # type: ignore[attr-defined]
    base = torch.autograd.function._SingleLevelFunction  # below Function.apply, which users keep references to

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return super(base, cls).apply(*args, **kwargs)

    def custom(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not active():
            return apply(cls, *args, **kwargs)
        if cls.__module__ == MODULE:
            return differentiable(ob, cls, apply, args)
        if cls.__name__.startswith(FUNCTIONAL):
            return followed(ob, functools.partial(apply, cls, *args, **kwargs))
        if cls is torch.utils.checkpoint.CheckpointFunction:
            return _reentrant(ob, *args)
        if cls.__name__ == "BackwardHookFunction" and not ob.nested:
            return gradients.hooks.module(cls, apply, args)
        return apply_custom(ob, cls, apply, args, kwargs)

    with contextlib.ExitStack() as stack:

        def put(owner: object, name: str, value: object) -> None:
            stack.enter_context(replaced(owner, name, value))

        utils = sys.modules.get("transformers.utils.import_utils")
        if hasattr(utils, "is_torchdynamo_compiling"):  # it asks before it looks at the values of tensors
            put(utils, "is_torchdynamo_compiling", lambda: True)
        put(torch.autograd, "_engine_run_backward", _engine(gradients, active))
        put(base, "apply", classmethod(custom))
        put(Tensor, "grad", _grad(ob, active))
        put(Tensor, "data", _data(ob, active))
        put(Tensor, "__deepcopy__", _deepcopy(ob, active))
        for owner, name, value in patches(ob, active) if torch.distributed.is_available() else ():
            put(owner, name, value)
        for make in (_texts, _bulk, _zero_grad, _retained, _files, _recomputed, _optimized, _lengths, packed):
            for owner, name, value in make(ob, active):
                put(owner, name, value)
        for owner, name, value in _hooks(gradients.hooks, active):
            put(owner, name, value)
        seed = _seed(ob, active, torch.random.manual_seed)
        for owner in (torch, torch.random):
            put(owner, "manual_seed", seed)
        pre = register_optimizer_step_pre_hook(before_step(ob, active))
        stack.callback(pre.remove)
        post = register_optimizer_step_post_hook(after_step(ob, active))
        stack.callback(post.remove)
        yield active, gradients
