"""The observer: a recorder under which the user's function really runs.

Every operator runs as eager PyTorch runs it, on the user's own tensors; what it computed becomes an equation.  Whether
a tensor carries a derivative, what a leaf is, what ``.grad`` holds are PyTorch's own answers, never an imitation.  A
value is found by the memory that a tensor lies in and where it lies there (:mod:`mlc.record.memories`), so views,
flat vectors, ``.data`` and rebound parameters mean what they mean in eager.

What was written is kept as it was before its first write, so that the program can be run from the same state, and so
that a call that fails leaves nothing behind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mlc.errors import CaptureError
from mlc.ir.core import Alias, Var
from mlc.ir.inplace import schema_of
from mlc.ir.origin import Origin
from mlc.ir.types import TensorType
from mlc.trace.communication.collectives import refuse_sharded
from mlc.trace.gradients.evaluate import evaluate
from mlc.trace.gradients.grads import get_grad
from mlc.trace.numbers.links import Linked
from mlc.trace.recorder.asdata import AsData
from mlc.trace.recorder.observing import tensors_in
from mlc.trace.recorder.randomness import key_of
from mlc.trace.recorder.specials import SPECIAL_REAL

__all__ = ["Observer"]

_A: Any = torch.ops.aten
_BASE: Any = torch._C.TensorBase
_KNOWN = ("mlc/runtime/collectives.py", "distributed/nn/functional.py")  # code that communicates as recorded


class Observer(AsData):
    """Records one real run of the user's function (arguments: :class:`.observing.Observing`)."""

    # ---- dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space = func.namespace
        if self.paused or space == "prim":
            if space == "c10d":
                self.unseen_communication()
            return func(*args, **(kwargs or {}))
        reads = self.reads if space == "aten" else None  # others may be the user's Python
        quiet = reads is not None and reads.pause()
        try:
            if types:
                refuse_sharded(self, types)
            return super().__torch_dispatch__(func, types, args, kwargs)
        except CaptureError as e:
            self.refusal = self.refusal or e
            raise
        finally:
            if reads is not None and quiet:
                reads.resume()

    def dispatch(self, func: Any, s: Any, special: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator and record it."""
        self.notice_mode()
        if any(map(torch.nn.parameter.is_lazy, tensors_in(args, kwargs))):
            return func(*args, **kwargs)  # of a lazy module: there is no value yet
        if torch.is_inference_mode_enabled():  # nothing took compound operators apart
            with self.active():
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if any(self._odd(t) for t in tensors_in(args, kwargs)):
            found = self._sparse_product(func, args, kwargs)
            return self._freeze(func, args, kwargs) if found is None else found
        if s.random:
            return self._drawing(func, s, special, args, kwargs)
        return super().dispatch(func, s, SPECIAL_REAL.get(func, special), args, kwargs)

    def unseen_communication(self) -> None:
        """Processes communicate where nothing is recorded: only known code may (what it computes is recorded)."""
        f: Any = sys._getframe(2)
        while f is not None and f is not self.sites.base:
            if f.f_code.co_filename.endswith(_KNOWN):
                return
            f = f.f_back
        self.unseen.append(self.place())

    def _drawing(self, func: object, s: object, special: object, args: Any, kwargs: Any) -> Any:
        """A random operator: an equation while its generator goes on from where the last one left it, else data."""
        if self.redraws is not None:
            return super().dispatch(func, s, SPECIAL_REAL.get(func, special), args, kwargs)
        generator = kwargs.get("generator")
        known = generator is None or key_of(generator) in self.generators
        self.random_is_data = self.random_is_data or not known or not self.random.continues(generator)
        try:
            return super().dispatch(func, s, SPECIAL_REAL.get(func, special), args, kwargs)
        finally:
            self.random.left(generator)

    def constant(self, t: Tensor, beside: tuple[Tensor | None, ...]) -> Tensor:
        """As :meth:`Recorder.constant`: operators inside another one do not see that it is tracked."""
        if not self.tracks([b for b in beside if b is not None], {}):
            return t
        var = self.read(t, True)
        with self.pause():
            c = t.detach().clone()
        self.bind(c, var)
        return c

    def plain(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run and record an operator as it stands, whatever is special about it."""
        with self.pause():
            out = func(*args, **kwargs)
        return self.recorded(func, schema_of(func), args, kwargs, out)

    def _result(self, func: Any, s: object, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    # ---- Python numbers

    def link(self, f: Callable[..., Tensor], *operands: object) -> Tensor | None:
        """Run ``f`` on numbers' tensors, recorded (see :class:`~mlc.trace.numbers.links.Ledger`)."""
        if self.ended:
            return None
        self.linked = True
        given = [x.tensor if isinstance(x, Linked) else x for x in operands]
        with torch._C.DisableTorchFunction(), torch.no_grad(), self.active():
            return f(*given)

    def quiet(self) -> AbstractContextManager[None]:
        """While operators run unseen, for numbers."""
        return self.pause()

    def scalar(self, t: Tensor) -> Any:
        """C++ or Python asks for the number in a tensor: the real one, which later calls must find again."""
        if self.inside and t.is_floating_point() and self.present(t).mask:
            raise CaptureError(
                "a tensor that is differentiated is used where an operator takes a plain number, and would lose its "
                "derivative",
                loc=self.place(),
                advice="multiply by the tensor instead of passing it as a number",
            )
        with self.pause():
            value = _A._local_scalar_dense.default(t)
        self.guard(t, value, "a Python number")
        return value

    # ---- .grad

    def read_grad(self, t: Tensor, accumulating: bool = False) -> None:
        """Python looks at ``t.grad``, or ``backward`` adds to it: what it was before the call counts."""
        if not accumulating:
            for w in self.watchers:
                w.settle(t)
        if id(t) not in self.grads:
            self.grad_reads.setdefault(id(t), (t, get_grad(t) is None))
            if not accumulating:
                self.grads_seen.add(id(t))

    def set_grad(self, t: Tensor, g: Tensor | None = None) -> None:
        """``t.grad`` is set: from here on it is the call's own."""
        for w in self.watchers:
            w.forget(t)
        self.keep_grad(t)
        self.grads[id(t)] = (t, None)

    def keep_grad(self, t: Tensor) -> None:
        """Remember what ``t.grad`` was before the call."""
        self.initial_grads.setdefault(id(t), (t, get_grad(t)))

    def zero(self, g: Tensor) -> None:
        """A gradient that PyTorch made of zeros."""
        with torch.no_grad(), self.active():
            z = torch.zeros(g.shape, dtype=g.dtype, device=g.device)
        self.bind(g, self.value(self.handle(z)))

    def add(self, a: Var, b: Var) -> Var:
        """The sum of two values of one shape."""
        (out,) = self.emit(_A.add.Tensor, (a, b), (a.type,))
        return out  # type: ignore[no-any-return]

    def evaluate(self, v: Var) -> Tensor:
        """The value of a gradient that PyTorch's graph does not have, computed from the recording."""
        return evaluate(self, [v])[0]

    # ---- copies

    def leaf_copy(self, t: Tensor, is_parameter: bool) -> Tensor:
        """A fresh leaf whose value is that of ``t``, derivative included."""
        v = self.value(self.handle(t))
        if t.requires_grad and t.is_leaf:
            v = self.read(t, False)
        self.farther = True
        before, self.tag = self.tag, Origin.CLONE
        (new,) = self.emit(Alias(), (v,), (v.type,))
        self.tag = before
        with self.pause(), torch.no_grad():
            c: Tensor = t.detach().clone(memory_format=torch.preserve_format)
            if TensorType.of(c) != v.type:
                ty = v.type
                assert isinstance(ty, TensorType)
                c = torch.empty_strided(ty.shape, ty.stride, dtype=ty.dtype, device=ty.device).copy_(t)
            if is_parameter:
                c = torch.nn.Parameter(c, requires_grad=t.requires_grad)
        h = self.bind(c, new)
        if is_parameter and c.requires_grad:
            h.leaf = h.storage.leaf = h.storage.copied = True
            self.new_bit(new)
            self.leaves[id(c)] = c
            self.seen_leaves[c] = True
        return c
