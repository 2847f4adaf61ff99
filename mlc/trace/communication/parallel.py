"""``DistributedDataParallel`` in the user's loop: its communication, written out.

A forward pass broadcasts the buffers of the group's first process (``broadcast_buffers``), and a ``backward()`` that
reaches the module's parameters ends with the mean over processes of what their ``.grad`` then holds; under
``no_sync()`` neither.  That is what is run and recorded here; PyTorch's reducer, which does the same in buckets from
below the interpreter, is not armed.  So its buckets, their order and overlap are not in the program; what it would
refuse is refused, and hooks that change what is communicated are.

A gradient that the loop takes with ``autograd.grad`` is no concern of the reducer's, and none here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from typing import Any

import torch
from torch import nn

from mlc.errors import CaptureError
from mlc.ir.communication.collectives import operator
from mlc.ir.literals import type_text
from mlc.ir.types import TensorType
from mlc.trace.communication.collectives import roll
from mlc.trace.gradients.grads import get_grad

__all__ = ["Parallel", "patches", "without_running"]


class Parallel:
    """The modules wrapped for data parallelism that one run uses."""

    def __init__(self, observer: Any) -> None:
        self.observer = observer
        self.seen: dict[int, Any] = {}
        self.armed: dict[int, Any] = {}  # those whose gradients the next backward() averages
        self._first: dict[int, Any] = {}  # where a module's first gradients were taken, if nothing averaged them

    def forward(self, ddp: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the place of ``DistributedDataParallel.forward``."""
        self._check(ddp)
        self.seen[id(ddp)] = ddp
        if ddp._check_sync_bufs_pre_fwd():
            self._buffers(ddp)
        if ddp.device_ids:
            from torch.distributed.utils import _to_kwargs

            device = torch.device(ddp.device_type, ddp.device_ids[0])
            moved, named = _to_kwargs(inputs, kwargs, device, ddp.use_side_stream_for_tensor_copies)
            inputs, kwargs = moved[0], named[0]
        out = ddp._run_ddp_forward(*inputs, **kwargs)
        if ddp._check_sync_bufs_post_fwd():
            self._buffers(ddp)
        sync = torch.is_grad_enabled() and ddp.require_backward_grad_sync
        if ddp.require_forward_param_sync is not sync:
            ddp.require_forward_param_sync = sync
        if sync:
            self.armed[id(ddp)] = ddp
        return out

    def _check(self, ddp: Any) -> None:
        hook = ddp._get_ddp_logging_data().get("comm_hook", "") if not ddp._use_python_reducer else ""
        odd = {
            "a communication hook": ddp._comm_hooks or hook or hasattr(ddp, "buffer_hook"),
            "mixed_precision": ddp.mixed_precision is not None,
            "join()": ddp._join_config.enable,
            "delay_all_reduce_named_params": ddp._delay_all_reduce_params,
        }
        for what, there in odd.items():
            if there:
                raise CaptureError(
                    f"DistributedDataParallel with {what}", loc=self.observer.place(),
                    advice="leave it out: gradients are averaged as they are",
                )  # fmt: skip

    def _buffers(self, ddp: Any) -> None:
        """Buffers of the group's first process."""
        ob, group = self.observer, ddp.process_group
        ddp._assign_modules_buffers()
        buffers = list(ddp.modules_buffers)
        roll(ob, group, f"broadcast of buffers ({_types(buffers)})")
        with torch.no_grad():
            for b in buffers:
                b.copy_(operator("broadcast")(b, 0, group.group_name))

    # ---- gradients

    def synchronise(self, reached: Set[int], create_graph: bool) -> None:
        """A ``backward()`` is over that reached these tensors (by identity)."""
        for key, ddp in self.seen.items():
            params = _managed(ddp)
            hit = [p for p in params if id(p) in reached]
            if not hit:
                continue
            if self.armed.pop(key, None) is None:
                self._first.setdefault(key, (self.observer.place(), _state(params)))
                continue
            first = self._first.setdefault(key, None)
            if first is not None and first[1] == _state(params):  # all the gradients so far are averaged now
                self._first[key] = None
            self._average(ddp, params, {id(p) for p in hit}, create_graph)

    def _average(self, ddp: Any, params: list[nn.Parameter], hit: set[int], create_graph: bool) -> None:
        ob, group = self.observer, ddp.process_group
        if create_graph:
            raise CaptureError(
                "backward(create_graph=True) through DistributedDataParallel, whose mean has no derivative in PyTorch",
                loc=ob.place(), advice="use torch.autograd.grad(..., create_graph=True) and average by "
                "torch.distributed.nn.functional.all_reduce, or call the module inside (ddp.module)",
            )  # fmt: skip
        some = ddp.find_unused_parameters or ddp.static_graph
        if len(hit) < len(params) and not some:
            missing = next(n for n, p in ddp.module.named_parameters() if p.requires_grad and id(p) not in hit)
            raise CaptureError(
                f"backward() does not reach {missing} of a module in DistributedDataParallel, which PyTorch refuses at "
                "the next forward", loc=ob.place(), advice="DistributedDataParallel(..., find_unused_parameters=True)",
            )  # fmt: skip
        note = [id(p) in hit for p in params]
        notes = [note]
        if ob.roll is not None:
            what = f"all_reduce of gradients ({_types(params)})"
            with ob.pause():
                notes = ob.roll.call(group, what, ob.place(), note)
        for p, used in zip(params, zip(*notes, strict=True), strict=True):
            if any(used):
                self._mean(p, group)

    def _mean(self, p: nn.Parameter, group: Any) -> None:
        if get_grad(p) is None:
            p.grad = torch.zeros_like(p)
        g = p.grad
        assert g is not None
        if g.layout is not torch.strided:
            raise CaptureError("a sparse gradient in DistributedDataParallel", loc=self.observer.place(),
                               advice="use dense gradients (sparse=False)")  # fmt: skip
        g.copy_(operator("all_reduce")(g, "avg", group.group_name))

    def end(self) -> None:
        """The call is over.

        Raises:
            CaptureError: where PyTorch's reducer would average the first gradients of the next call, under
                ``no_sync()`` or not, as the last forward pass of this one asked for it and no backward came.
        """
        for key, ddp in self.seen.items():
            first = self._first.get(key)
            if first is not None and (key in self.armed or self.observer.unseen):
                raise CaptureError(
                    "the first gradients of a call are taken under no_sync(), but a forward pass before them, outside "
                    "of it, has no backward yet: PyTorch averages these", loc=first[0],
                    advice="run that forward pass (the validation of the call before) on the module inside: "
                    f"{type(ddp).__name__}.module(...)",
                )  # fmt: skip

    def averaged(self) -> dict[int, str]:
        """Names of groups that the hypergradient of a parameter is averaged over, by identity of the parameter."""
        return {id(p): ddp.process_group.group_name for ddp in self.seen.values() for p in _managed(ddp)}


def _managed(ddp: Any) -> list[nn.Parameter]:
    """Parameters that the reducer sees, in its order."""
    ignored = ddp.parameters_to_ignore
    return [p for n, p in ddp.module.named_parameters() if p.requires_grad and n not in ignored]


def _state(params: list[nn.Parameter]) -> list[Any]:
    """What is different when parameters were updated, or their gradients set anew."""
    return [(p._version, id(get_grad(p))) for p in params]


def _types(ts: list[Any]) -> str:
    return ", ".join(type_text(TensorType.of(t)) for t in ts)


def patches(ob: Any, active: Callable[[], bool]) -> Iterator[tuple[Any, str, Any]]:
    """What is replaced in torch while the user's function runs."""
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data.distributed import DistributedSampler

    forward: Any = DistributedDataParallel.forward
    make: Any = DistributedDataParallel.__init__

    def run(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        return ob.parallel.forward(self, inputs, kwargs) if active() else forward(self, *inputs, **kwargs)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if active():
            raise CaptureError(
                "DistributedDataParallel is made in the loop", loc=ob.place(),
                advice="wrap the module before the call and pass the wrapped one",
            )  # fmt: skip
        make(self, *args, **kwargs)

    epoch: Any = DistributedSampler.set_epoch

    def set_epoch(self: Any, *args: Any, **kwargs: Any) -> None:
        epoch(self, *args, **kwargs)
        if active():
            ob.unplaced.append(ob.place())  # what is drawn next depends on it: only the loop itself does that again

    yield DistributedSampler, "set_epoch", set_epoch
    yield DistributedDataParallel, "forward", run
    yield DistributedDataParallel, "__init__", init
    yield from _objects(ob, active)
    functional: Any = torch.distributed._functional_collectives
    wrap = functional._maybe_wrap_tensor
    yield functional, "_maybe_wrap_tensor", lambda t: t if active() else wrap(t)  # it is complete already


def without_running(ob: Any, active: Callable[[], bool]) -> Iterator[tuple[Any, str, Any]]:
    """What is replaced while a function is traced on fake tensors: the reducer's part is not seen there."""
    from torch.nn.parallel import DistributedDataParallel

    forward: Any = DistributedDataParallel.forward

    def refuse(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        if active():
            raise CaptureError(
                "DistributedDataParallel in a trace without running", loc=ob.place(),
                advice="trace it for real (fake=False), or the module inside of it (module.module)",
            )  # fmt: skip
        return forward(self, *inputs, **kwargs)

    yield DistributedDataParallel, "forward", refuse


def _objects(ob: Any, active: Callable[[], bool]) -> Iterator[tuple[Any, str, Any]]:
    """Python objects that processes exchange are pickled and unpickled where nobody sees it."""
    module: Any = torch.distributed.distributed_c10d

    def refusing(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if active():
                raise CaptureError(
                    "processes exchange Python objects in the loop", loc=ob.place(),
                    advice="exchange them before the call and pass them as arguments, or use tensors",
                )  # fmt: skip
            return original(*args, **kwargs)

        return call

    for name in ("_object_to_tensor", "_tensor_to_object"):
        if hasattr(module, name):
            yield module, name, refusing(getattr(module, name))
