"""Operators that an observer does not take literally, where that differs from recording on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlc.ir.core import Random
from mlc.ir.inplace import by_name, schema_of
from mlc.ir.types import TensorType
from mlc.trace.recorder.asdata import AsData

__all__ = ["SPECIAL_REAL"]

_A: Any = torch.ops.aten


def _literal(ob: AsData, func: object, args: Any, kwargs: object) -> Any:
    """``torch.tensor(...)``: a constant."""
    t: Tensor = args[0]
    if ob.memories.find(t) is not None:
        return t
    if t.numel() == 1 and not t.dtype.is_complex:
        with ob.pause():
            value = t.item()
        kw = (("dtype", t.dtype), ("device", t.device), ("pin_memory", False))
        ob.bind(t, ob.emit(_A.full.default, (list(t.shape), value), (TensorType.of(t),), kw)[0])
    else:
        ob.from_outside(t, ob.memories.of(t), None)
    return t


def _zeros(ob: AsData, func: object, args: Any, kwargs: Any) -> Any:
    kw = {k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}
    with ob.active():
        return torch.zeros(list(args[0]), **kw)


def _dropout(ob: AsData, func: Any, args: Any, kwargs: Any) -> Any:
    """Fused dropout as a product with the mask that it drew."""
    x, p, train = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("train", True)
    if not train:
        with ob.active():
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
    _, mask = func(*args, **kwargs)
    if ob.random_is_data:
        ob.data(mask)
    else:
        ty = TensorType.of(x)
        layout = (ty.shape, ty.stride, ty.dtype, ty.device)
        (v,) = ob.emit(Random(_A.native_dropout.default, fill=True), (*layout, p), (TensorType.of(mask),))
        ob.bind(mask, v)
    with ob.active():
        return x * mask * (0.0 if p == 1 else 1.0 / (1.0 - p)), mask


def _rrelu(ob: AsData, func: Any, args: Any, kwargs: Any) -> Any:
    """Randomised leaky ReLU: the slopes are drawn, the rest is a product."""
    given = by_name(func, args, kwargs)
    x, noise = given["self"], given["noise"]
    lower, upper = given.get("lower", 0.125), given.get("upper", 1 / 3)
    if not given.get("training", False):
        with ob.active():
            return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
    values = tuple(ob.value(ob.handle(t)) for t in (x, noise))
    pure = _A.rrelu_with_noise_functional.default
    out, slopes = pure(x, noise, lower, upper, True, given.get("generator"))
    if ob.random_is_data:
        ob.data(slopes)
    else:
        types = [TensorType.of(out), TensorType.of(slopes)]
        ob.bind(slopes, ob.emit(Random(pure), (*values, lower, upper, True), types)[1])
    with ob.active():
        with torch.no_grad():
            noise.copy_(slopes)
        return x * slopes


def _norm(ob: AsData, func: Any, args: Any, kwargs: Any) -> Any:
    """Batch normalisation in evaluation, as inference mode calls it: one operator has the rules."""
    with ob.pause():
        out = func(*args, **kwargs)
    x, weight, bias, mean, var, momentum, eps = args
    plain = _A.native_batch_norm.default
    return ob.recorded(plain, schema_of(plain), (x, weight, bias, mean, var, False, momentum, eps), kwargs, out)


def _ctc(ob: AsData, func: Any, args: Any, kwargs: Any) -> Any:
    """Lengths in tensors are numbers that later calls must find again: sizes follow from them."""
    with ob.pause():
        out = func(*args, **kwargs)
        numbers = [t.tolist() for t in args[2:4]]
    for t, what in zip(args[2:4], ("input lengths", "target lengths"), strict=True):
        ob.guard(t, t.clone(), f"the {what} of ctc_loss")
    plain = _A._ctc_loss.default
    return ob.recorded(plain, schema_of(plain), (*args[:2], *numbers, *args[4:]), kwargs, out)


def _pack(ob: AsData, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """A packed sequence picks the rows that its lengths tell; later calls must find these lengths again."""
    x, lengths, batch_first = args
    with ob.pause():
        _, sizes = func(*args, **kwargs)
        steps = x.shape[1 if batch_first else 0]
        rows = x.shape[0 if batch_first else 1]
        places = [
            b * steps + t if batch_first else t * rows + b for t, n in enumerate(sizes.tolist()) for b in range(n)
        ]
        index = torch.tensor(places, device=x.device)
    ob.guard(lengths, lengths.clone(), "the lengths of a packed sequence")
    for constant in (sizes, index):
        ob.from_outside(constant, ob.memories.of(constant), None)
    with ob.active():
        return x.reshape(rows * steps, *x.shape[2:]).index_select(0, index), sizes


def _unscale(ob: AsData, func: object, args: Any, kwargs: object) -> None:
    """``GradScaler.unscale_``, operator by operator; whether it then steps is a guard like any other."""
    grads, found, inverse = args
    with ob.active(), torch.no_grad():
        for g in grads:
            found.copy_(torch.maximum(found, g.isfinite().logical_not().any().to(found.dtype)))
            g.mul_(inverse.to(g.dtype))


def _update_scale(ob: AsData, func: object, args: Any, kwargs: object) -> Tensor:
    """``GradScaler.update``: smaller after a step that was skipped, larger after so many that were not."""
    scale, tracker, found, growth, backoff, interval = args
    with ob.active(), torch.no_grad():
        bad, taken, larger = found > 0, tracker + 1, scale * growth
        full = taken == interval
        kept = torch.where(full & larger.isfinite(), larger, scale)
        scale.copy_(torch.where(bad, scale * backoff, kept))
        tracker.copy_(torch.where(bad | full, torch.zeros_like(taken), taken))
    return scale  # type: ignore[no-any-return]


def _native(ob: AsData, func: Any, args: Any, kwargs: Any) -> Any:
    """The memory of a tensor is replaced or resized: what it then holds is found where it then lies."""
    return func(*args, **kwargs)


SPECIAL_REAL: dict[Any, Any] = {
    _A.lift_fresh.default: _literal,
    _A._efficientzerotensor.default: _zeros,
    _A.native_dropout.default: _dropout,
    _A.rrelu_with_noise.default: _rrelu,
    _A._grouped_mm.default: lambda ob, f, a, k: ob.plain(f, a, k),
    _A._ctc_loss.Tensor: _ctc,
    _A._pack_padded_sequence.default: _pack,
    _A._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
    _A._amp_update_scale_.default: _update_scale,
    _A._native_batch_norm_legit_no_training.default: _norm,
    _A.set_.source_Storage: _native,
    _A.set_.source_Tensor: _native,
    _A.set_.source_Storage_storage_offset: _native,
    _A.resize_.default: _native,
}
