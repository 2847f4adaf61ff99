"""How a walk looks at objects: their entries, attributes and bindings as they are now.

:class:`~mlc.trace.python.world.World` answers the same questions for the moment before a call.  Attributes are read
from ``__dict__`` and slots alone: no property, ``__getattr__`` or descriptor of the user's runs because we look.
"""

from __future__ import annotations

import array
import io
import marshal
import queue
import sys
import types
import weakref
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import is_lazy

from mlc.ir.types import TensorType
from mlc.trace.python.frames import is_user_file

__all__ = [
    "MISSING",
    "View",
    "digest",
    "digest_of_data",
    "fields_of",
    "is_followed_module",
    "is_opaque",
    "is_user_class",
    "slots_of",
    "type_of",
]

MISSING = object()
WHOLE = 64 << 20  # bytes of an array up to which all of it is hashed at every call
_CHUNK = 1 << 20
_HUGE = 1000  # entries
_DATA = {int, float, bool, str, bytes, complex, type(None), tuple}
_OPEN = {"types", "collections", "dataclasses", "functools", "argparse", "array", "random", "__main__", "string", "abc"}
_CLOSED = ("torch._C", "torch._dynamo", "torch._inductor", "torch._ops", "torch.autograd", "torch.backends",
           "mlc.implicit.log", "torch.cuda", "torch.fx", "torch.profiler", "_thread")  # fmt: skip
_ALONE = (
    array.array, memoryview, weakref.ref, types.BuiltinFunctionType, types.GeneratorType, types.CoroutineType,
    types.FrameType, types.TracebackType, types.CodeType, types.CellType,
)  # fmt: skip
_LIBRARY = set(sys.stdlib_module_names) - _OPEN


_SLOTS: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()


def slots_of(cls: type) -> list[str]:
    """Names of the slots of a class and its bases, as attributes."""
    known = _SLOTS.get(cls)
    if known is not None:
        return known
    out = _SLOTS[cls] = []
    for c in cls.__mro__:
        names = c.__dict__.get("__slots__", ())
        for n in (names,) if isinstance(names, str) else tuple(names):
            if n in ("__dict__", "__weakref__") or not isinstance(n, str):
                continue
            private = n.startswith("__") and not n.endswith("__")
            out.append(f"_{c.__name__.lstrip('_')}{n}" if private else n)
    return out


def type_of(t: Tensor) -> TensorType | None:
    """Type of a strided tensor; None for other layouts and for parameters without a shape yet."""
    return TensorType.of(t) if t.layout is torch.strided and not is_lazy(t) else None


def fields_of(x: object) -> dict[str, Any]:
    """Attributes that an object itself holds; nothing of the object's own code runs."""
    out: dict[str, Any] = {}
    try:
        held = object.__getattribute__(x, "__dict__")
    except (AttributeError, TypeError):
        held = None
    if isinstance(held, dict):
        out.update(held)
    for n in slots_of(type(x)):
        try:
            out[n] = object.__getattribute__(x, n)
        except AttributeError:
            continue
    return out


def is_opaque(x: object) -> bool:
    """Whether an object is left alone: locks, files, weak references, running code, most of the standard library."""
    cls = type(x)
    home = cls.__module__ or ""
    if isinstance(x, _GROUPS):
        return True
    if isinstance(x, (types.FunctionType, *_ALONE)):
        return not isinstance(x, types.FunctionType)
    return (home.split(".")[0] in _LIBRARY or home.startswith(_CLOSED)) and not is_user_class(cls)


_VALUES = {"fractions", "decimal", "datetime", "pathlib", "uuid", "re", "zoneinfo", "ipaddress"}  # they never change
_BUFFERS = (io.StringIO, io.BytesIO, queue.Queue, queue.SimpleQueue)


_GROUPS: tuple[type, ...] = (dist.ProcessGroup, DeviceMesh) if dist.is_available() else ()


def group_of(x: Any) -> Any:
    """What processes a group or a mesh is of, and by which names PyTorch finds them."""
    if isinstance(x, dist.ProcessGroup):
        return x.group_name, tuple(dist.get_process_group_ranks(x))
    names = tuple(x.get_group(d).group_name for d in range(x.ndim)) if x.get_coordinate() is not None else ()
    return names, tuple(x.mesh.shape), tuple(x.mesh.flatten().tolist())


def value_of(x: object) -> Any:
    """What an object that is left alone is equal by: itself where it is a value, its bytes; else None.

    A buffer or queue, which every use changes, is equal to nothing.
    """
    cls = type(x)
    if isinstance(x, _BUFFERS):
        return object()
    if isinstance(x, _GROUPS):
        return group_of(x)
    if isinstance(x, (array.array, memoryview)):
        return x.tobytes()
    return x if (cls.__module__ or "").split(".")[0] in _VALUES else None


def is_followed_module(m: types.ModuleType) -> bool:
    """Whether a module is one of the user's files, or was made by hand."""
    file = m.__dict__.get("__file__")
    if not isinstance(file, str):
        return m.__dict__.get("__spec__") is None
    return is_user_file(file)


_CLASSES: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def is_user_class(cls: type) -> bool:
    """Whether a class was written by the user."""
    known = _CLASSES.get(cls)
    if known is None:
        known = _CLASSES[cls] = _is_user_class(cls)
    return known


def _is_user_class(cls: type) -> bool:
    if cls.__module__ == "builtins":
        return False
    home = sys.modules.get(cls.__module__)
    if home is not None and cls.__module__ != "__main__" and isinstance(home.__dict__.get("__file__"), str):
        return is_followed_module(home)
    return home is None or is_followed_module(home) or cls.__module__ == "__main__"


def digest_of_data(items: Any) -> int | None:
    """A hash of a long list of plain values and tuples of them (file names and labels), at C's speed; else None."""
    if len(items) < _HUGE or not all(type(v) in _DATA for v in items):
        return None
    try:
        return hash(marshal.dumps(list(items), 2))  # 2: without references, so that equal lists are equal bytes
    except ValueError:
        return None


def digest(a: np.ndarray[Any, Any]) -> Any:
    """What stands for the content of an array: a hash of all up to 64 MiB, of 1024 samples beyond (and of maps)."""
    if a.dtype.hasobject:
        return tuple(id(v) for v in a.flat[:4096]), a.size
    if a.nbytes > WHOLE or isinstance(a, np.memmap):
        at = np.linspace(0, max(a.size - 1, 0), num=min(1024, a.size), dtype=np.int64)
        return id(a), hash(a.flat[at].tobytes())
    flat = a if a.flags.c_contiguous else np.ascontiguousarray(a)
    if not flat.size:
        return 0
    data = memoryview(flat.reshape(-1).view(np.uint8).data)
    return hash(tuple(hash(data[i : i + _CHUNK].tobytes()) for i in range(0, len(data), _CHUNK)))


def hooks_of_all_modules() -> list[tuple[tuple[int, int], Any]]:
    """Hooks put on every module there is (``register_module_forward_hook`` and the like): kind and number, function."""
    of = torch.nn.modules.module
    tables = (
        of._global_forward_pre_hooks,
        of._global_forward_hooks,
        of._global_backward_pre_hooks,
        of._global_backward_hooks,
    )
    return [((kind, i), f) for kind, t in enumerate(tables) if t for i, f in enumerate(t.values())]


class View:
    """Objects as they are now."""

    def body(self, x: object) -> Any:
        """Entries of a dict, list, tuple, set, deque."""
        return x

    def attrs(self, x: object) -> dict[str, Any]:
        """Attributes of an object."""
        return fields_of(x)

    def bound(self, owner: Any, name: str) -> Any:
        """What a global (``owner`` is the namespace), a cell or a class attribute holds; MISSING when nothing."""
        if isinstance(owner, types.CellType):
            try:
                return owner.cell_contents
            except ValueError:
                return MISSING
        if isinstance(owner, type):
            return owner.__dict__.get(name, MISSING)
        return owner.get(name, MISSING)

    def facts(self, t: Tensor) -> tuple[Any, bool, bool, Tensor | None]:
        """Type (None when not strided), ``requires_grad``, whether a leaf, ``grad``."""
        return type_of(t), t.requires_grad, t.is_leaf, t.grad if t.is_leaf else None

    def hooks(self, t: Tensor) -> tuple[Any, ...]:
        """Backward hooks of a tensor, by kind: before and after accumulation, a list or None each."""
        tables = (t._backward_hooks, t._post_accumulate_grad_hooks)
        return tuple([None if h is None else list(h.items()) for h in tables]) if any(tables) else ()

    def was_there(self, x: object) -> bool:
        """Whether an object existed before the call; nothing is known of that now."""
        return False

    def digest(self, a: np.ndarray[Any, Any]) -> Any:
        """What stands for the content of an array."""
        return digest(a)
