"""How the 0-d tensor of a number takes the place of a Python scalar in the operators of torch: a table of handlers.

The result has the value, dtype and shape that eager PyTorch gives with the plain number: a Python scalar takes part in
type promotion by its category only, so a number's float64 is cast where it would promote further.  A handler raises
:class:`NoTensor` where the operator takes no tensor there (or where eager PyTorch raises): the caller then gives the
plain number, guarded by its value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mlc.trace.numbers.links import Linked, StandIn, constant, pin, plain

__all__ = ["DATA", "HANDLERS", "NoTensor", "found", "leaves", "pinned", "tree"]

Handler = Callable[[Any, str, "list[Any]", "dict[str, Any]"], Any]


class NoTensor(Exception):
    """This operator cannot take a tensor here."""


_NONE = set(map(id, (Tensor, torch.nn.Parameter, int, float, bool, str, type(None), torch.dtype, torch.device)))
# most arguments' types; by identity, since the class of a number equals float


def found(x: object) -> bool:
    """Whether an argument has a number, or a stand-in for a class, in it."""
    if id(type(x)) in _NONE:
        return False
    if isinstance(x, (Linked, StandIn)):
        return True
    if isinstance(x, (list, tuple)):
        return any([found(y) for y in x if id(type(y)) not in _NONE])
    if isinstance(x, dict):
        return any([found(y) for y in x.values() if id(type(y)) not in _NONE])
    return isinstance(x, slice) and (found(x.start) or found(x.stop) or found(x.step))


def tree(x: Any, f: Callable[[Any], Any]) -> Any:
    """The argument tree with ``f`` of its leaves; what has no number in it stays the same object."""
    if not found(x):
        return x
    if isinstance(x, (Linked, StandIn)):
        return f(x)
    if isinstance(x, dict):
        return {k: tree(v, f) for k, v in x.items()}
    if isinstance(x, slice):
        return slice(tree(x.start, f), tree(x.stop, f), tree(x.step, f))
    items = [tree(y, f) for y in x]
    if isinstance(x, list):
        return items
    return type(x)(*items) if hasattr(x, "_fields") else tuple(items)


def pinned(x: object, what: str) -> Any:
    """The argument with plain numbers, whose exact values are guarded."""
    return tree(x, lambda y: pin(y, what) if isinstance(y, Linked) else y)


def _values(x: object) -> Any:
    return tree(x, plain)


def _on(t: Tensor, device: torch.device) -> Tensor:
    return t if t.device == device else t.to(device)


def _held(value: Any, dtype: torch.dtype) -> None:
    """Refuse a number that does not fit the dtype it is put into: eager PyTorch has its own message for that."""
    if not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or isinstance(value, complex)):
        info = torch.iinfo(dtype)
        if not info.min <= value <= info.max:
            raise NoTensor


def operand(n: object, *others: object) -> Any:
    """The tensor of a number in an operator with ``others``, promoting as the plain number would."""
    if not isinstance(n, Linked):
        return n
    tensors = [x for x in others if isinstance(x, Tensor)]
    if not tensors:
        raise NoTensor
    t = _on(n.tensor, tensors[0].device)
    want = torch.result_type(tensors[0], n.value)
    _held(n.value, want)
    return t if torch.result_type(tensors[0], t) == want else t.to(want)


def exactly(n: object, like: Tensor) -> Any:
    """The tensor of a number in the dtype of a tensor that it is written into."""
    if not isinstance(n, Linked):
        return n
    _held(n.value, like.dtype)
    if isinstance(n.value, complex) and not like.dtype.is_complex:
        raise NoTensor
    return _on(n.tensor, like.device).to(like.dtype)


def _summand(y: Any, *others: Any) -> Any:
    """``y`` in the dtype of the sum that it enters, in which eager PyTorch multiplies it by ``alpha``."""
    if not isinstance(y, Tensor):
        return y
    for x in others:
        want = torch.result_type(y, plain(x))
        y = y if want == y.dtype else y.to(want)
    return y


def _scaled(y: Any, factor: Any) -> Any:
    """``y * factor`` for ``alpha=`` and its kin, where an integral tensor takes no float."""
    if not isinstance(factor, Linked):
        return y * factor
    if isinstance(y, Tensor):
        if torch.result_type(y, factor.value) != y.dtype or isinstance(factor.value, bool):
            raise NoTensor
        return y * operand(factor, y)
    return y * factor


def _binary(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Elementwise operators of two operands; ``alpha`` scales the second."""
    for key in ("other", "exponent"):
        if key in kwargs and len(args) == 1:
            args.append(kwargs.pop(key))
    if len(args) != 2:
        raise NoTensor
    if isinstance(args[0], Linked) and name not in _SCALAR_FIRST:
        raise NoTensor
    if isinstance(kwargs.get("alpha"), Linked):
        alpha = kwargs.pop("alpha")
        if name == "rsub":  # other - alpha * self
            args[0] = _scaled(_summand(args[0], args[1]), alpha)
        else:
            args[1] = _scaled(_summand(args[1], args[0]), alpha)
    if found(kwargs):
        raise NoTensor
    a, b = args
    if name.startswith("pow") and not torch.result_type(plain(a), plain(b)).is_floating_point:
        raise NoTensor  # a negative exponent is an error there
    if name.startswith("float_power"):  # in float64, whatever comes in
        a, b = (x.tensor if isinstance(x, Linked) else x for x in (a, b))
    return func(operand(a, b), operand(b, a), **kwargs)


def _where(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if len(args) != 3 or kwargs or not isinstance(args[0], Tensor):
        raise NoTensor
    cond, a, b = args if func is not Tensor.where else (args[1], args[0], args[2])
    if not isinstance(cond, Tensor):
        raise NoTensor
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        want = torch.result_type(plain(a), plain(b))
        pair = [
            x.tensor.to(want) if isinstance(x, Linked) else torch.full((), x, dtype=want, device=cond.device)
            for x in (a, b)
        ]
        return torch.where(cond, *(_on(t, cond.device) for t in pair))
    return torch.where(cond, operand(a, b), operand(b, a))


def _add_product(func: object, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """``addcmul`` and ``addcdiv``: self + value * a * b, self + value * (a / b)."""
    value = kwargs.pop("value", None)
    if len(args) != 3 or kwargs or not isinstance(value, Linked):
        raise NoTensor
    x, a, b = args
    if isinstance(value.value, float) and not torch.result_type(a, b).is_floating_point:
        raise NoTensor
    a = _summand(a, x, b)
    product = _scaled(a, value) * b if "mul" in name else _scaled(a / b, value)
    return x.add_(product) if name.endswith("_") else x + product


def _matrix(func: object, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """``addmm`` and its kin: beta * self + alpha * product."""
    if len(args) != 3 or not set(kwargs) <= {"alpha", "beta"}:
        raise NoTensor
    x, a, b = args
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if plain(beta) == 0:
        raise NoTensor  # NaN in self is ignored then
    product = _PRODUCTS[name.removesuffix("_")](a, b)
    product, x_part = _scaled(product, alpha), _scaled(x, beta)
    return x.copy_(x_part + product) if name.endswith("_") else x_part + product


_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "addmm": torch.mm,
    "addmv": torch.mv,
    "addr": torch.outer,
    "baddbmm": torch.bmm,
    "addbmm": lambda a, b: torch.bmm(a, b).sum(0),
}


def _lerp(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if "weight" in kwargs:
        args.append(kwargs.pop("weight"))
    if len(args) != 3 or kwargs or not isinstance(args[2], Linked) or isinstance(args[2].value, complex):
        raise NoTensor
    return func(args[0], args[1], exactly(args[2], args[0]))


def _clamp(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Bounds as tensors: all of them, in the dtype that the result has."""
    x, bounds = args[0], dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
    if name.removesuffix("_") in ("clamp_min", "clamp_max") and len(args) == 2:
        bounds = {name.removesuffix("_")[-3:]: args[1]}
    if (
        not isinstance(x, Tensor)
        or not set(bounds) <= {"min", "max"}
        or any(isinstance(b, Tensor) for b in bounds.values())
    ):
        raise NoTensor
    want = x.dtype
    for b in bounds.values():
        if b is not None:
            want = torch.promote_types(want, torch.result_type(x, plain(b)))
    if (name.endswith("_") and want != x.dtype) or want.is_complex or want == torch.bool:
        raise NoTensor
    like = x if want == x.dtype else x.to(want)
    sides = {
        k: exactly(b, like) if isinstance(b, Linked) else torch.full((), b, dtype=want, device=x.device)
        for k, b in bounds.items()
        if b is not None
    }
    return torch.clamp_(x, **sides) if name.endswith("_") else torch.clamp(like, **sides)


def _last_written(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """``fill_``, ``masked_fill``, ``index_fill``: the last operand is written as it is."""
    if "value" in kwargs:
        args.append(kwargs.pop("value"))
    if kwargs or found(args[:-1]) or not isinstance(args[-1], Linked):
        raise NoTensor
    if not name.startswith("fill") and not torch.can_cast(torch.result_type(args[0], args[-1].value), args[0].dtype):
        raise NoTensor
    return func(*args[:-1], exactly(args[-1], args[0]))


def _setitem(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x, index, value = args
    return func(x, pinned(index, "an index"), exactly(value, x))


def _scatter(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if "value" in kwargs:
        args.append(kwargs.pop("value"))
    if len(args) != 4 or kwargs or not isinstance(args[3], Linked) or found(args[1]):
        raise NoTensor
    x, dim, index, value = args
    return func(x, dim, index, exactly(value, x).expand(index.shape))


def _index_add(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    alpha = kwargs.pop("alpha", None)
    if len(args) != 4 or kwargs or not isinstance(alpha, Linked) or found(args):
        raise NoTensor
    return func(*args[:3], _scaled(args[3], alpha))


def _dtype_only(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return func(*_values(args), **_values(kwargs))


def _filled(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """``full`` and its kin: made with the plain value as eager makes them, then filled with the linked one."""
    at = 2 if name == "new_full" else 0 if name == "scalar_tensor" else 1
    key = "s" if name == "scalar_tensor" else "fill_value"
    value = kwargs[key] if key in kwargs else (args[at] if len(args) > at else None)
    if not isinstance(value, Linked) or "out" in kwargs:
        raise NoTensor
    args = [plain(a) if a is value else pinned(a, "a size") for a in args]
    kwargs = {k: plain(v) if v is value else pinned(v, "a size") for k, v in kwargs.items()}
    with torch.no_grad():
        grad = kwargs.pop("requires_grad", False)
        out: Tensor = func(*args, **kwargs)
        out.fill_(exactly(value, out))
    return out.requires_grad_() if grad else out


def _from_data(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """``torch.tensor`` and its kin, of nested lists of numbers and tensors: their 0-d tensors, stacked."""
    at, key = (1, "data") if name == "new_tensor" else (0, "obj" if name == "asarray" else "data")
    source = kwargs[key] if key in kwargs else (args[at] if len(args) > at else None)
    flat = list(leaves(source))
    whole = all(isinstance(x, Linked) or constant(x) or (isinstance(x, Tensor) and x.numel() == 1) for x in flat)
    if source is None or isinstance(source, Tensor) or not whole or kwargs.get("pin_memory"):
        raise NoTensor
    grad = kwargs.pop("requires_grad", False)
    with _disable_current_modes():  # only to learn dtype, shape and device
        like: Tensor = func(*_values(args), **_values(kwargs))
    with torch.no_grad():
        parts = [_leaf(x, like) for x in flat]
        out = torch.stack(parts).reshape(like.shape) if len(parts) > 1 else parts[0].reshape(like.shape).clone()
    return out.requires_grad_() if grad else out


def leaves(x: object) -> Iterator[Any]:
    """What nested lists and tuples hold."""
    if isinstance(x, (list, tuple)):
        for y in x:
            yield from leaves(y)
    else:
        yield x


def _leaf(x: Any, like: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach().reshape(()).to(like)
    if isinstance(x, Linked):
        return _on(x.tensor, like.device).to(like.dtype)
    return torch.full((), x, dtype=like.dtype, device=like.device)


def _index(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return func(args[0], pinned(args[1], "an index"))


_BINARY = """
    add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow float_power rsub xlogy copysign
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    eq ne lt le gt ge not_equal less less_equal greater greater_equal bitwise_and bitwise_or bitwise_xor
    bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ __ixor__
    __ilshift__ __irshift__
"""
_SCALAR_FIRST = {
    "pow", "float_power", "remainder", "floor_divide", "xlogy", "bitwise_and", "bitwise_or", "bitwise_xor",
    "bitwise_left_shift", "bitwise_right_shift",
}  # fmt: skip
DATA = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_BINARY.split(), _binary),
    **dict.fromkeys(("addcmul", "addcdiv"), _add_product),
    **dict.fromkeys(_PRODUCTS, _matrix),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("fill", "masked_fill", "index_fill"), _last_written),
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor"), _filled),
    **dict.fromkeys(("tensor", "as_tensor", "asarray", "new_tensor"), _from_data),
    "where": _where, "lerp": _lerp, "scatter": _scatter, "index_add": _index_add, "result_type": _dtype_only,
    "__setitem__": _setitem, "__getitem__": _index,
}  # fmt: skip
