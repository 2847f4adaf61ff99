"""Random graphs of objects that refer to each other in every way, and what can be done to them."""

import collections
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

from mlc.trace.python.view import fields_of


class Base:
    __slots__ = ("__hidden", "a", "b")

    def __init__(self) -> None:
        self.a, self.__hidden = [1], {"h": 1}

    def touch(self) -> None:
        self.a.append(2)
        self.b = 3
        self.__hidden["h"] = 2
        self.__hidden = {}


class Slotted(Base):
    __slots__ = ("c",)


class Both(Slotted):
    def __init__(self) -> None:
        super().__init__()
        self.d: Any = {"x": 1}


class Node:
    def __init__(self) -> None:
        self.held: Any = None


KINDS: list[Callable[[], Any]] = [
    dict, list, set, collections.deque, Node, Slotted, Both, collections.OrderedDict, bytearray,
    lambda: collections.defaultdict(list), lambda: torch.ones(2), lambda: np.arange(3), lambda: nn.Linear(1, 1),
    lambda: SGD([torch.ones(1, requires_grad=True)], lr=0.1, momentum=0.9), lambda: types.SimpleNamespace(q=1),
]  # fmt: skip


def graph(rng: random.Random, size: int) -> list[Any]:
    """Objects that refer to each other, cycles included."""
    torch.manual_seed(0)
    objects = [rng.choice(KINDS)() for _ in range(size)]
    for _ in range(2 * size):
        link(rng, objects)
    return objects


def link(rng: random.Random, objects: list[Any], new: bool = False) -> None:
    """Refer to another object (a new one, perhaps) in some way."""
    x, y = rng.choice(objects), rng.choice([*objects, rng.randrange(9), str(rng.random()), None])
    if new and rng.random() < 0.3:
        y = graph(rng, 3)
        y.append(rng.choice(objects))
    if isinstance(x, dict):
        x[rng.randrange(6)] = y
    elif isinstance(x, (list, collections.deque)):
        x.append(y)
    elif isinstance(x, set):
        x.add(rng.randrange(100))
    elif isinstance(x, bytearray):
        x.append(rng.randrange(256))
    elif isinstance(x, Node):
        x.held = y
    elif isinstance(x, (Slotted, Both)):
        x.b = y
    elif isinstance(x, types.SimpleNamespace):
        setattr(x, f"n{rng.randrange(4)}", y)
    elif isinstance(x, nn.Module) and (isinstance(y, nn.Module) or "kept" not in x._modules):
        x.kept = y


def unlink(rng: random.Random, objects: list[Any]) -> None:
    """Take something away, or change it in another way."""
    x = rng.choice(objects)
    if isinstance(x, (dict, list, set, collections.deque, bytearray)) and len(x):
        if rng.random() < 0.3:
            x.clear()
        elif isinstance(x, dict):
            del x[next(iter(x))]
        else:
            x.pop()
    elif isinstance(x, (Slotted, Both)) and hasattr(x, "b"):
        del x.b
    elif isinstance(x, np.ndarray):
        x[0] += 1
    elif isinstance(x, nn.Linear):
        x.weight = nn.Parameter(torch.full((1, 1), rng.random()))
    elif isinstance(x, torch.Tensor) and x.is_leaf:
        if rng.random() < 0.3:
            x.data = torch.full((2,), rng.random())
        elif rng.random() < 0.5:
            x.requires_grad_(not x.requires_grad)
        else:
            x.grad = torch.full_like(x, rng.random())
    elif isinstance(x, SGD):
        x.param_groups[0]["lr"] = rng.random()
        p = x.param_groups[0]["params"][0]
        p.grad = torch.ones_like(p)
        x.state[p]["momentum_buffer"] = torch.full_like(p, rng.random())


def picture(x: Any, ids: bool = True, seen: dict[Any, int] | None = None) -> Any:
    """Everything about an object graph; with identities of the objects, or up to isomorphism."""
    seen = {} if seen is None else seen

    def number(key: Any) -> int:
        return seen.setdefault(key, len(seen))

    if isinstance(x, types.FunctionType) and not ids:
        return x.__qualname__
    if isinstance(x, (int, float, str, bytes, type(None), types.FunctionType, type)):
        return x
    if id(x) in seen:
        return ("again", seen[id(x)])
    me = id(x) if ids else number(id(x))
    seen[id(x)] = len(seen)
    if isinstance(x, torch.Tensor):
        memory = x.data_ptr() if ids else number(x.untyped_storage()._cdata)
        grad = (id(x.grad) if ids else picture(x.grad, ids, seen)) if x.is_leaf else 0 if ids else None
        odd = (x._version, list((x._backward_hooks or {}).items())) if ids else x.detach().reshape(-1).tolist()
        leaf = x.is_leaf or not ids  # a value left in an attribute has no graph at later calls
        needs = x.requires_grad and (x.is_leaf or ids)
        return (me, type(x), memory, x.dtype, x.shape, x.stride(), needs, leaf, grad, odd)
    if isinstance(x, np.ndarray):
        return (me, x.tobytes())
    body: Any = None
    if isinstance(x, dict):
        body = [(picture(k, ids, seen), picture(v, ids, seen)) for k, v in x.items()]
    elif isinstance(x, (list, tuple, collections.deque)):
        body = [picture(v, ids, seen) for v in x]
    elif isinstance(x, set):
        body = sorted(map(str, x))
    elif isinstance(x, bytearray):
        body = bytes(x)
    return (me, type(x), body, [(k, picture(v, ids, seen)) for k, v in sorted(fields_of(x).items())])
