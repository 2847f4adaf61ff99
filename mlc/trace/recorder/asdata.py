"""What a run gives that no equation can give again: taken as data of this call, where nothing is differentiated by it.

Sizes that depend on data, sparse matrices, random numbers of generators that are set or made in the loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlc.errors import CaptureError
from mlc.ir.inplace import schema_of
from mlc.ir.trees import flatten
from mlc.trace.recorder.observing import tensors_in
from mlc.trace.recorder.writing import Writing

__all__ = ["AsData"]

_A: Any = torch.ops.aten
_BASE: Any = torch._C.TensorBase


class AsData(Writing):
    """The part of an observer that takes results as data."""

    def recorded(self, func: Any, s: Any, args: Any, kwargs: object, out: Any) -> Any:
        """As :meth:`Recorder.recorded`, or as data where no equation says it."""
        if any(isinstance(o, Tensor) and self._odd(o) for o in flatten(out)):
            self._refuse_odd(args, kwargs, next(o for o in flatten(out) if isinstance(o, Tensor) and self._odd(o)))
            return self._as_data(func, args, kwargs, out)
        if torch.Tag.dynamic_output_shape in func.tags and func is not _A._ctc_loss.default:  # its lengths are given
            if func is _A.index.Tensor:
                return self._masked(func, s, args, kwargs, out)
            return self._as_data(func, args, kwargs, out)
        if s.random and self.random_is_data:
            return self._as_data(func, args, kwargs, out)
        result = super().recorded(func, s, args, kwargs, out)
        if func is _A.clone.default and self.copying():
            self.copies[self.present(out)] = self.place()
        return result

    def _masked(self, func: object, s: Any, args: Any, kwargs: object, out: Any) -> Any:
        """``x[mask]``: the places where the mask holds are data of this call."""
        indices: list[Any] = []
        for i in args[1]:
            if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8):
                with self.pause():
                    found = i.nonzero().unbind(1)
                for f in found:
                    self.data(f)
                self._note("a mask picks elements", i)
                indices += found
            else:
                indices.append(i)
        return super().recorded(func, s, (args[0], indices), kwargs, out)

    def _note(self, what: str, t: Tensor | None = None) -> None:
        self.frozen.append((what, self.place()))

    def _as_data(self, func: object, args: object, kwargs: object, out: object) -> Any:
        """Take what an operator gave as data of this call: right where no derivative goes through it.

        Raises:
            CaptureError: where one does.
        """
        for t in tensors_in(args, kwargs):
            h = self.handle(t) if not self._odd(t) else None
            if h is not None and t.dtype.is_floating_point and self.value(h).mask:
                results = [o for o in flatten(out) if isinstance(o, Tensor)]
                if any(o.dtype.is_floating_point for o in results):
                    raise CaptureError(
                        f"the result of {func} has a size that depends on values that are differentiated",
                        loc=self.place(),
                        advice="use torch.where or multiply by the mask instead of picking elements",
                    )
        for o in flatten(out):
            if isinstance(o, Tensor) and not self._odd(o):
                self.data(o)
        self._note(f"{func} is run anew")
        return out

    def _freeze(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator on tensors that programs have no values for (sparse ones): data, if nothing is differentiated."""
        for t in tensors_in(args, kwargs):
            if t.requires_grad and torch.is_grad_enabled():
                raise CaptureError(
                    f"a {t.layout} tensor that requires grad is used",
                    loc=self.place(),
                    advice="convert it with .to_dense() before the call",
                )
        self._refuse_odd(args, kwargs, next(x for x in tensors_in(args, kwargs) if self._odd(x)))
        return self._as_data(func, args, kwargs, func(*args, **kwargs))

    def _refuse_odd(self, args: Any, kwargs: Any, odd: Tensor) -> None:
        for t in tensors_in(args, kwargs):
            if not self._odd(t) and t.dtype.is_floating_point and self.value(self.handle(t)).mask:
                raise CaptureError(
                    f"a {odd.layout} tensor is used",
                    loc=self.place(),
                    advice="convert it with .to_dense() before the call",
                )

    def _sparse_product(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A sparse matrix of data times a dense one: the product of the matrix written out; None if it is no such."""
        at = 0 if func is _A.mm.default else 1
        op = {_A.mm.default: func, _A.addmm.default: func, _A._sparse_addmm.default: _A.addmm.default}.get(func)
        if op is None or [self._odd(t) for t in args[: at + 2]] != [i == at for i in range(at + 2)]:
            return None
        if args[at].requires_grad:
            return None
        dense = self.written_out.get(args[at])
        with self.pause():
            out = func(*args, **kwargs)
            if dense is None:
                dense = self.written_out[args[at]] = args[at].to_dense()
                self.data(dense)
        return super().recorded(op, schema_of(op), (*args[:at], dense, *args[at + 1 :]), kwargs, out)

    def guard(self, t: Tensor, outcome: object, what: str) -> None:
        """Later calls must find the same outcome in ``t``."""
        if self.ended:
            return
        var = self.present(t)
        self.decisions.append((var, outcome, what, self.place()))
