"""Types and literals of the text form: how a dtype, a shape, a device, a number or an object is written.

``f32[4,8]`` is a contiguous float32 tensor on the CPU; ``f32[4,8]{1,4}@cuda:0`` has strides and a device of
its own; ``seq[f32[4,8], 3]`` is a sequence of three (``?``: as many as there are at run time). Literals are
Python's, with ``@cpu`` for devices, the short names for dtypes and ``torch.strided`` for layouts and memory
formats.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from mlc.ir.builder import contiguous
from mlc.ir.core import Var
from mlc.ir.types import SeqType, TensorType, Type

__all__ = ["DTYPES", "FORMATS", "Objects", "Opaque", "dtype_text", "literal_text", "type_text"]

_SHORT = {"float": "f", "int": "i", "uint": "u", "complex": "c"}


def dtype_text(dtype: torch.dtype) -> str:
    """Short name: ``f32``, ``bf16``, ``i64``, ``bool``; others as torch calls them."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16:
        return "bf16"
    m = re.fullmatch(r"(float|int|uint|complex)(\d+)", name)
    return _SHORT[m[1]] + m[2] if m else name


DTYPES = {dtype_text(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
FORMATS: dict[str, Any] = {
    str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.layout | torch.memory_format)
}


@dataclass(frozen=True)
class Opaque:
    """Stands in a parsed program for an object that text cannot hold (a ``torch.Generator``)."""

    kind: str
    index: int


class Objects:
    """Numbers objects that text cannot hold, in the order in which they are met."""

    def __init__(self) -> None:
        self._known: dict[Any, Opaque] = {}
        self._alive: list[Any] = []

    def __call__(self, x: Any) -> Opaque:
        """The stand-in of ``x``; stand-ins are numbered anew."""
        key = x if isinstance(x, Opaque) else id(x)
        if key not in self._known:
            kind = x.kind if isinstance(x, Opaque) else type(x).__name__
            self._known[key] = Opaque(kind, len(self._known))
            self._alive.append(x)
        return self._known[key]


def type_text(t: Type) -> str:
    """A type as the text form writes it."""
    if isinstance(t, SeqType):
        return f"seq[{type_text(t.elem)}, {'?' if t.length is None else t.length}]"
    assert isinstance(t, TensorType)
    out = f"{dtype_text(t.dtype)}[{','.join(map(str, t.shape))}]"
    if t.stride != contiguous(t.shape):
        out += "{" + ",".join(map(str, t.stride)) + "}"
    return out if t.device == torch.device("cpu") else f"{out}@{t.device}"


def _number(a: complex) -> str:
    return f"complex({float(a.real)!r}, {float(a.imag)!r})"


def literal_text(a: Any, name: Any, objects: Objects) -> str:
    """An argument as the text form writes it.

    Args:
        a: A Var, a literal, or a list, tuple or dict of them.
        name: Gives the name of a Var.
        objects: Numbers what has no literal.
    """

    def inner(x: Any) -> str:
        return literal_text(x, name, objects)

    t = type(a)
    if t is Var:
        return str(name(a))
    if t is list:
        return "[" + ", ".join(map(inner, a)) + "]"
    if isinstance(a, tuple):
        return "(" + ", ".join(map(inner, a)) + ("," if len(a) == 1 else "") + ")"
    if t is dict:
        return "{" + ", ".join(f"{json.dumps(k)}: {inner(v)}" for k, v in a.items()) + "}"
    if a is None or t in (bool, int, float):
        return repr(a)
    if t is complex:
        return _number(a)
    if t is str:
        return json.dumps(a)
    if t is torch.dtype:
        return dtype_text(a)
    if t is torch.device:
        return f"@{a}"
    if t is OpOverload:
        return str(a)
    if t in (torch.layout, torch.memory_format):
        return str(a)
    thing = objects(a)
    return f"object({json.dumps(thing.kind)}, {thing.index})"
