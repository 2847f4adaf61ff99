"""Fake tensors made from their types.

A recording needs a fake tensor for every result.  Running an operator on fake tensors tells its results' types once;
after that, results of the same types can be made directly, at a fraction of the cost.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from mlc.ir.trees import each_tensor, map_tensors
from mlc.ir.types import TensorType

__all__ = ["Fakes", "Result", "try_types"]

_MAX_TRIED = 1 << 24  # elements

Result = tuple[TensorType, int | None]  # a type, and for a view of the first argument the offset in its memory


class Fakes:
    """Makes fake tensors of one mode, and numbers the types of tensors."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._numbers: dict[TensorType, int] = {}
        self._types: list[TensorType] = []
        self._states: dict[torch.device, dict[str, Any]] = {}

    def make(self, t: TensorType) -> FakeTensor:
        """A fake tensor with memory of its own."""
        elem = torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device="meta")
        return self._dress(elem, t)

    def view(self, base: FakeTensor, t: TensorType, offset: int) -> FakeTensor:
        """A fake tensor in the memory of ``base``, ``offset`` elements from its start."""
        elem = torch.empty(0, dtype=t.dtype, device="meta")
        elem.set_(base.untyped_storage(), offset, t.shape, t.stride)
        return self._dress(elem, t)

    def _dress(self, elem: Tensor, t: TensorType) -> FakeTensor:
        """What ``FakeTensor(mode, elem, device)`` does, with the state of one made before."""
        state = self._states.get(t.device)
        if state is None:
            f = FakeTensor(self.mode, elem, t.device)
            self._states[t.device] = dict(vars(f))
        else:
            f = Tensor._make_subclass(FakeTensor, elem, False, dispatch_device=True, device_for_backend_keys=t.device)
            torch._C._set_throw_on_mutable_data_ptr(f)
            vars(f).update(state)
        self._note(f, t)
        return f

    def _note(self, f: Tensor, t: TensorType) -> int:
        n = self._numbers.get(t)
        if n is None:
            n = self._numbers[t] = len(self._types)
            self._types.append(t)
        f._mlc_type = n  # type: ignore[attr-defined]
        return n

    def number(self, f: Tensor) -> int:
        """The number of a fake tensor's type: equal for equal types."""
        n: int | None = vars(f).get("_mlc_type")
        return self._note(f, TensorType.of(f)) if n is None else n

    def type(self, f: Tensor) -> TensorType:
        """Type of a fake tensor."""
        return self._types[self.number(f)]

    def forget(self, f: FakeTensor) -> None:
        """The tensor is about to change its shape in place."""
        vars(f).pop("_mlc_type", None)

    def results(self, out: Any, base: Any) -> tuple[bool, list[Result]] | None:
        """What must be known to make ``out`` again: one tensor or several, and each; None when it cannot be.

        Args:
            out: What an operator gave.
            base: For a view operator, the fake tensor that it views.
        """
        parts = [out] if isinstance(out, Tensor) else out
        if not isinstance(parts, (list, tuple)) or not parts or any(type(t) is not FakeTensor for t in parts):
            return None
        memory = None if base is None else base.untyped_storage()._cdata
        shared = [memory is not None and t.untyped_storage()._cdata == memory for t in parts]
        of = [(self.type(t), t.storage_offset() if s else None) for t, s in zip(parts, shared, strict=True)]
        return isinstance(out, Tensor), of

    def again(self, known: tuple[bool, list[Result]], base: Any) -> Any:
        """Fresh results of an operator that ran before with the same signature."""
        made = [self.make(t) if offset is None else self.view(base, t, offset) for t, offset in known[1]]
        return made[0] if known[0] else tuple(made)


def try_types(func: Any, args: Any, kwargs: Any) -> None:
    """Run an operator that mixes floating types on zeros, where fake kernels are laxer than real ones.

    Raises:
        RuntimeError: PyTorch's own, about the types; other errors may come from the zeros and are nobody's.
    """
    found: list[Tensor] = []
    each_tensor((args, kwargs), found.append)
    if len({t.dtype for t in found if t.dtype.is_floating_point}) < 2 or sum(t.numel() for t in found) > _MAX_TRIED:
        return

    def real(t: Tensor) -> Tensor:
        ty = TensorType.of(t)
        return torch.empty_strided(ty.shape, ty.stride, dtype=ty.dtype, device=ty.device).zero_()

    with _disable_current_modes(), torch.no_grad():
        try:
            func(*map_tensors(args, real), **{k: map_tensors(v, real) for k, v in kwargs.items()})
        except RuntimeError as e:
            if re.search(r"d-?type|scalar ?type|same type", str(e), re.IGNORECASE):
                raise
