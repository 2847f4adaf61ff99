"""What is replaced in torch while a loop is traced, and put back afterwards.

Only calls that do not reach the dispatcher need this: gradients, ``.grad``, Python numbers, hooks, optimizer steps,
and things that cannot be traced, which get their own message here.  Other threads keep the original behaviour.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mlc.errors import CaptureError
from mlc.trace.communication.parallel import without_running
from mlc.trace.customs import apply_custom
from mlc.trace.faketracer import FakeTracer
from mlc.trace.numbers import placeholders as scalars
from mlc.trace.optimizers import after_step, before_step

__all__ = ["patched"]

_BASE: Any = torch._C.TensorBase


def on_this_thread() -> Callable[[], bool]:
    """A question to ask later: whether this thread, which asks now, is recording."""
    me = threading.get_ident()

    def active() -> bool:
        return threading.get_ident() == me and torch._C._len_torch_dispatch_stack() > 0

    return active


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Context in which an attribute of a class or module is another one."""
    missing = object()
    old = vars(owner).get(name, missing) if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if old is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


def _engine(tracer: FakeTracer, active: Callable[[], bool]) -> Any:
    original = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run(outputs: Any, grad_tensors: Any, keep_graph: Any = False, create_graph: Any = False, inputs: Any = (),
            allow_unreachable: bool = True, accumulate_grad: bool = False, **kw: Any) -> Any:  # fmt: skip
        wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in outputs if isinstance(t, Tensor))
        if not active() or wrapped:
            return original(
                outputs, grad_tensors, keep_graph, create_graph, inputs,
                allow_unreachable=allow_unreachable, accumulate_grad=accumulate_grad, **kw,
            )  # fmt: skip
        for t in (*outputs, *inputs):
            if t._backward_hooks:
                raise _hook(tracer)
        if accumulate_grad:
            leaves = list(inputs) or tracer.reachable_leaves(outputs)
            for t, g in zip(leaves, tracer.gradient(outputs, leaves, grad_tensors, create_graph), strict=True):
                if g is not None:
                    tracer.accumulate(t, g)
            return None
        grads = tracer.gradient(outputs, list(inputs), grad_tensors, create_graph)
        if not allow_unreachable and any(g is None for g in grads):
            which = next(i for i, g in enumerate(grads) if g is None)
            raise CaptureError(
                f"input {which} of autograd.grad was not used to compute the loss",
                loc=tracer.place(),
                advice="pass allow_unused=True or materialize_grads=True",
            )
        return tuple(grads)

    return run


def _hook(tracer: FakeTracer) -> CaptureError:
    return CaptureError(
        "backward hooks cannot be traced: what they do to the gradient is not an equation of the program",
        loc=tracer.place(),
        advice="change the gradient after backward() instead, in the loop itself",
    )


def _refuse(make: Callable[[], CaptureError], active: Callable[[], bool], original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if active():
            raise make()
        return original(*args, **kwargs)

    return call


def _numbers(tracer: FakeTracer, active: Callable[[], bool]) -> Iterator[tuple[Any, str, Any]]:
    base: Any = torch._C.TensorBase

    def item(t: Tensor) -> Any:
        return tracer.item(t) if active() else base.item(t)

    def tolist(t: Tensor) -> Any:
        if not active():
            return base.tolist(t)
        if t.dim() == 0:
            return tracer.item(t)
        if t.numel() <= 4096:
            return [tolist(x) for x in t.unbind(0)]
        raise CaptureError("tolist() of a large tensor while tracing", loc=tracer.place(), advice="keep it a tensor")

    def number(kind: Any, what: str) -> Any:
        original = getattr(base, f"__{kind.__name__}__") if hasattr(base, f"__{kind.__name__}__") else None

        def convert(t: Tensor) -> Any:
            if not active():
                return original(t) if original is not None else kind(base.item(t))
            return tracer.decide(t, kind, what)

        return convert

    def fmt(t: Tensor, spec: str) -> str:
        if active():
            return "<traced>" if t.numel() == 1 else f"<traced {tuple(t.shape)}>"
        return str(original_format(t, spec))

    def text(t: Tensor, *args: object, **kwargs: object) -> str:
        if active() and (isinstance(t, FakeTensor) or id(t) in tracer.handles):
            return f"<traced {t.dtype} {tuple(t.shape)}>"
        return str(original_repr(t, *args, **kwargs))

    original_format: Any = Tensor.__format__
    original_repr: Any = Tensor.__repr__
    yield Tensor, "item", item
    yield Tensor, "tolist", tolist
    yield Tensor, "__bool__", number(bool, "a branch")
    yield Tensor, "__float__", number(float, "a Python float")
    yield Tensor, "__int__", number(int, "a Python int")
    yield Tensor, "__index__", number(int, "an index")
    yield Tensor, "__format__", fmt
    yield Tensor, "__repr__", text


def _numpy(tracer: FakeTracer, active: Callable[[], bool]) -> Iterator[tuple[Any, str, Any]]:
    def make() -> CaptureError:
        return CaptureError(
            "a tensor is converted to NumPy while tracing: its values are not known yet, and NumPy code has no "
            "derivative",
            loc=tracer.place(),
            advice="use torch operators, or convert outside the compiled function",
        )

    yield Tensor, "numpy", _refuse(make, active, _BASE.numpy)
    yield Tensor, "__array__", _refuse(make, active, Tensor.__array__)


def _data(tracer: FakeTracer, active: Callable[[], bool]) -> property:
    base = _BASE.data

    def get(t: Tensor) -> Any:
        return base.__get__(t)

    def put(t: Tensor, value: Tensor) -> None:
        if active():
            if isinstance(value, (FakeTensor, Tensor)) and tracer.same_memory(t, value):
                return  # what `p.data -= g` does last
            raise CaptureError(
                "assigning to .data replaces the memory of a tensor behind autograd's back",
                loc=tracer.place(),
                advice="write `with torch.no_grad(): p.copy_(new)`",
            )
        base.__set__(t, value)

    return property(get, put)


def _grad(tracer: FakeTracer, active: Callable[[], bool]) -> property:
    base = _BASE.grad

    def get(t: Tensor) -> Any:
        return tracer.get_grad(t) if active() else base.__get__(t)

    def put(t: Tensor, value: Any) -> None:
        if active():
            tracer.set_grad(t, value)
        else:
            base.__set__(t, value)

    def drop(t: Tensor) -> None:
        put(t, None)

    return property(get, put, drop)


def _seed(tracer: FakeTracer, active: Callable[[], bool], original: Any) -> Any:
    def manual_seed(seed: Any) -> Any:
        if active():
            tracer.seed(int(seed))
        return original(seed)

    return manual_seed


def _checkpoint(active: Callable[[], bool]) -> Any:
    original = torch.utils.checkpoint.checkpoint

    def run(function: Any, *args: Any, **kwargs: Any) -> Any:
        if not active():
            return original(function, *args, **kwargs)
        for k in ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"):
            kwargs.pop(k, None)
        return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def patched(tracer: FakeTracer) -> Iterator[None]:
    """Install the replacements for the time of a trace."""
    active = on_this_thread()
    base = torch.autograd.function._SingleLevelFunction  # below Function.apply, which users keep references to

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return super(base, cls).apply(*args, **kwargs)

    def custom(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not active():
            return apply(cls, *args, **kwargs)
        return apply_custom(tracer, cls, apply, args, kwargs)

    def hook() -> CaptureError:
        return _hook(tracer)

    with contextlib.ExitStack() as stack:
        stack.enter_context(scalars.deciding(tracer.decide))

        def put(owner: object, name: str, value: object) -> None:
            stack.enter_context(replaced(owner, name, value))

        utils = sys.modules.get("transformers.utils.import_utils")
        if hasattr(utils, "is_torchdynamo_compiling"):  # it asks before it looks at the values of tensors
            put(utils, "is_torchdynamo_compiling", lambda: True)
        put(torch.autograd, "_engine_run_backward", _engine(tracer, active))
        put(base, "apply", classmethod(custom))
        put(Tensor, "grad", _grad(tracer, active))
        put(Tensor, "data", _data(tracer, active))
        for owner, name, value in without_running(tracer, active) if torch.distributed.is_available() else ():
            put(owner, name, value)
        for owner, name, value in (*_numbers(tracer, active), *_numpy(tracer, active)):
            put(owner, name, value)
        put(Tensor, "register_hook", _refuse(hook, active, Tensor.register_hook))
        put(
            Tensor,
            "register_post_accumulate_grad_hook",
            _refuse(hook, active, Tensor.register_post_accumulate_grad_hook),
        )
        for name in ("register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"):
            put(nn.Module, name, _refuse(hook, active, getattr(nn.Module, name)))
        put(torch.utils.checkpoint, "checkpoint", _checkpoint(active))
        for owner in (torch, torch.random):
            put(owner, "manual_seed", _seed(tracer, active, torch.random.manual_seed))
        pre = register_optimizer_step_pre_hook(before_step(tracer, active))
        stack.callback(pre.remove)
        post = register_optimizer_step_post_hook(after_step(tracer, active))
        stack.callback(post.remove)
        yield
