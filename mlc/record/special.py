"""Operators that the recorder does not take literally: hidden mutation, hidden randomness, checks, constants."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mlc.errors import CaptureError
from mlc.ir.core import Random
from mlc.ir.inplace import by_name, schema_of
from mlc.ir.types import TensorType
from mlc.record.values import Values

__all__ = ["FILLED", "SPECIAL", "factory"]

_A: Any = torch.ops.aten
Handler = Callable[[Values, Any, Any, Any], Any]


def _batch_norm(rec: Values, func: object, args: Any, kwargs: object) -> Any:
    """Train-mode batch norm: the pure normalisation, then the running statistics as ordinary in-place updates."""
    x, weight, bias, mean, var, training, momentum, eps = args[:8]
    with rec.active():
        if not training and rec.differentiated(mean, var):
            mean, var = (rec.constant(s, (x, weight, bias)) for s in (mean, var))
            return _by_running_statistics(x, weight, bias, mean, var, eps)
        if not training:
            return rec.plain(_A.native_batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps), {})
        out = rec.plain(_A.native_batch_norm.default, (x, weight, bias, None, None, True, momentum, eps), {})
        if mean is not None:
            with torch.no_grad():
                dims = [d for d in range(x.dim()) if d != 1]
                mean.mul_(1 - momentum).add_(x.mean(dims).to(mean.dtype), alpha=momentum)
                spread = torch.var(x, dims, correction=1).to(var.dtype)
                var.mul_(1 - momentum).add_(spread, alpha=momentum)
    return out


def _by_running_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Any:
    """Eval-mode batch norm spelt out: PyTorch's own has no derivative by the statistics."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    out = (x - mean.view(shape)) * (var + eps).rsqrt().view(shape)
    out = out if weight is None else out * weight.view(shape)
    out = out if bias is None else out + bias.view(shape)
    return out, x.new_empty(0), x.new_empty(0)


def _batch_norm_like(mean_at: int | None, extra: bool = False) -> Handler:
    """Relatives of ``native_batch_norm``: other places of the statistics, one more result."""

    def run(rec: Values, func: Any, args: Any, kwargs: Any) -> Any:
        given = by_name(func, args, kwargs)
        mean, var = (given.get("running_mean"), given.get("running_var")) if mean_at is not None else (None, None)
        head = (given["input"], given.get("weight"), given.get("bias"), mean, var)
        out = _batch_norm(rec, func, (*head, given.get("training", True), given["momentum"], given["eps"]), {})
        if not extra:
            return out
        with rec.active():
            return (*out, torch.zeros(0, dtype=torch.uint8, device=given["input"].device))

    return run


def _rrelu(rec: Values, func: Any, args: Any, kwargs: Any) -> Any:
    """Randomised leaky ReLU: the slopes are drawn, the rest is a product."""
    given = by_name(func, args, kwargs)
    x, noise = given["self"], given["noise"]
    lower, upper = given.get("lower", 0.125), given.get("upper", 1 / 3)
    with rec.active():
        if not given.get("training", False):
            return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
        types = [TensorType.of(rec.twin(t)) for t in (x, noise)]
        values = tuple(rec.value(rec.handle(t)) for t in (x, noise))
        op = Random(_A.rrelu_with_noise_functional.default)
        slopes = rec.fresh(rec.emit(op, (*values, lower, upper, True), types)[1])
        with torch.no_grad():
            noise.copy_(slopes)
        return x * slopes


def _equal(rec: Values, func: object, args: Any, kwargs: object) -> bool:
    """A branch on whether two tensors are equal."""
    a, b = args
    if a.shape != b.shape:
        return False
    with rec.active():
        return bool(rec.scalar(torch.eq(a, b).all()))


def _grouped_mm(rec: Values, func: Any, args: Any, kwargs: Any) -> Any:
    """Grouped matrix product; its fake kernel knows bfloat16 only, the real one more."""
    given = by_name(func, args, kwargs)
    a, b, offs = given["self"], given["mat2"], given.get("offs")
    dtype = given.get("out_dtype") or a.dtype
    lead: list[int] = []
    if a.dim() == b.dim():
        lead = [a.shape[0] if offs is None or a.dim() == 3 else offs.shape[0]]
    with torch.utils._python_dispatch._disable_current_modes(), rec.fake_mode:
        out = torch.empty([*lead, a.shape[-2], b.shape[-1]], dtype=dtype, device=a.device)
    return rec.recorded(func, schema_of(func), args, kwargs, out)


def _dropout(rec: Values, func: object, args: Any, kwargs: Any) -> Any:
    """Fused dropout as a product with a mask that is drawn as the fused operator draws it."""
    x, p, train = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("train", True)
    with rec.active():
        if not train:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        ty = TensorType.of(rec.twin(x))
        mask_type = TensorType(torch.bool, ty.shape, ty.stride, ty.device)
        layout = (ty.shape, ty.stride, ty.dtype, ty.device)
        (v,) = rec.emit(Random(_A.native_dropout.default, fill=True), (*layout, p), (mask_type,))
        mask = rec.fresh(v)
        return x * mask * (0.0 if p == 1 else 1.0 / (1.0 - p)), mask


def _zeros(rec: Values, func: object, args: Any, kwargs: Any) -> Any:
    kw = {k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}
    with rec.active():
        zero = torch.zeros(list(args[0]), **kw)
    if list(args[0]):
        return zero
    # autograd may mark it as a Python number and read it: that needs memory
    with torch.utils._python_dispatch._disable_current_modes():
        real = torch.zeros([], **{**kw, "device": "cpu"})
    rec.handles[id(real)] = (real, rec.handle(zero))
    rec.literals[id(real)] = zero  # type: ignore[assignment]
    return real


def _literal(rec: Values, func: object, args: Any, kwargs: object) -> Any:
    """``torch.tensor(...)``: a constant; single numbers are kept as literals."""
    t = args[0]
    if isinstance(t, FakeTensor) or id(t) in rec.handles:
        return t
    with torch.utils._python_dispatch._disable_current_modes():
        value = t.item() if t.numel() == 1 and not t.dtype.is_complex else None
        shape, dtype, device = list(t.shape), t.dtype, t.device
    if value is None:
        rec.external(t)
        with rec.active():
            return t.clone()
    with rec.active():
        return torch.full(shape, value, dtype=dtype, device=device)


def _nothing(rec: Values, func: object, args: object, kwargs: object) -> None:
    return None


def _set(rec: Values, func: object, args: object, kwargs: object) -> Any:
    raise CaptureError(
        f"{func} replaces the memory of a tensor",
        loc=rec.locate()[0],
        advice="copy values with copy_() instead",
    )


def _resize(rec: Values, func: object, args: Any, kwargs: object) -> Any:
    t: Tensor = args[0]
    if list(t.shape) == list(args[1]):
        return t
    return _set(rec, func, args, kwargs)


def _scaler(rec: Values, func: object, args: object, kwargs: object) -> Any:
    raise CaptureError(
        "GradScaler decides on data whether to step",
        loc=rec.locate()[0],
        advice="use bfloat16 autocast without a GradScaler inside the compiled function",
    )


# Factories that look at a tensor only for its layout, with the value they fill in (None: it is an argument).
FILLED: dict[Any, float | None] = {
    _A.zeros_like.default: 0, _A.ones_like.default: 1, _A.empty_like.default: 0, _A.full_like.default: None,
    _A.new_zeros.default: 0, _A.new_ones.default: 1, _A.new_empty.default: 0, _A.new_full.default: None,
    _A.new_empty_strided.default: 0,
}  # fmt: skip


def factory(func: object, args: Any, kwargs: Any, ty: TensorType) -> tuple[Any, Any, Any]:
    """A factory as ``full(shape, value)``, which depends on no tensor."""
    value = FILLED[func]
    if value is None:
        value = args[-1] if type(args[-1]) in (int, float, bool) else dict(kwargs)["fill_value"]
    kw = (("dtype", ty.dtype), ("device", ty.device), ("pin_memory", False))
    return _A.full.default, (list(ty.shape), value), kw


def _chunked_loss(rec: Values, func: object, args: object, kwargs: object) -> Any:
    raise CaptureError(
        "linear_cross_entropy in chunks computes its gradient in the forward pass; the derivative of that "
        "gradient is silently wrong in PyTorch",
        loc=rec.locate()[0],
        advice="call it without chunking options",
    )


def _embedding(rec: Values, func: object, args: Any, kwargs: Any) -> Any:
    if (len(args) > 4 and args[4]) or kwargs.get("sparse"):
        raise CaptureError(
            "an embedding with sparse=True has sparse gradients, which cannot be differentiated again",
            loc=rec.locate()[0],
            advice="use Embedding(sparse=False)",
        )
    return rec.plain(func, args, kwargs)


SPECIAL: dict[Any, Handler] = {
    _A.native_batch_norm.default: _batch_norm,
    _A.cudnn_batch_norm.default: _batch_norm,
    _A._native_batch_norm_legit.default: _batch_norm_like(3),
    _A._native_batch_norm_legit.no_stats: _batch_norm_like(None),
    _A._batch_norm_with_update.default: _batch_norm_like(3, extra=True),
    _A.rrelu_with_noise.default: _rrelu,
    _A.equal.default: _equal,
    _A._grouped_mm.default: _grouped_mm,
    _A.native_dropout.default: _dropout,
    _A._efficientzerotensor.default: _zeros,
    _A.lift_fresh.default: _literal,
    _A.embedding.default: _embedding,
    _A._assert_async.msg: _nothing,
    _A._assert_async.default: _nothing,
    _A._assert_tensor_metadata.default: _nothing,
    _A.set_.source_Storage: _set,
    _A.set_.source_Tensor: _set,
    _A.set_.source_Storage_storage_offset: _set,
    _A.resize_.default: _resize,
    _A._amp_foreach_non_finite_check_and_unscale_.default: _scaler,
}

with contextlib.suppress(ImportError):  # torch >= 2.13; the operator is registered by its module
    importlib.import_module("torch.nn.modules.linear_cross_entropy")
    SPECIAL[torch.ops.torch_nn._linear_cross_entropy_batch_chunked.default] = _chunked_loss
