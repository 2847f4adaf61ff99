"""The walk finds everything that a call can reach, under paths that mean the same at the next call."""

import collections
import dataclasses
import os
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from mlc.trace.python.inputs import walk
from mlc.trace.python.places import Roots
from tests.trace.python.watched import watch


def roots(*args: Any) -> Roots:
    return walk(lambda *a: None, args, {})


@dataclasses.dataclass(slots=True)
class Item:
    x: torch.Tensor
    n: int = 1


@dataclasses.dataclass(slots=True)
class More(Item):
    y: Any = None


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Old:
    __slots__ = ("_x", "opt")


class Wrapped(Optimizer):
    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.param_groups, self.defaults, self.state = inner, inner.param_groups, inner.defaults, {}


class Delegating(Optimizer):
    """As in accelerate: nothing is its own."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups


def sgd() -> SGD:
    p = torch.ones(1, requires_grad=True)
    opt = SGD([p], lr=0.1, momentum=0.9)
    p.sum().backward()
    opt.step()
    return opt


def engine(inner: Optimizer) -> types.ModuleType:
    m = types.ModuleType("engine")
    m.opt = inner
    return m


def slotted(inner: Optimizer) -> Old:
    o = Old()
    o._x, o.opt = 1, inner
    return o


HOLDERS: dict[str, Callable[[Optimizer], Any]] = {
    "plain": lambda o: o, "object": lambda o: types.SimpleNamespace(o=o), "wrapper": Wrapped, "delegating": Delegating,
    "deep": lambda o: {"a": [(types.SimpleNamespace(x=Wrapped(o)),)]}, "slots": slotted, "method": lambda o: o.step,
    "deque": lambda o: collections.deque([o]), "tuple": lambda o: Pair(o, o),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOLDERS)
def test_optimizers_are_found_in_everything(kind: str) -> None:
    inner = sgd()
    r = roots(HOLDERS[kind](inner))
    assert any(o is inner for o in r.optimizers.values())
    state = next(iter(inner.state.values()))["momentum_buffer"]
    assert id(state) in r.tensors and id(inner.param_groups[0]["params"][0]) in r.tensors


def test_an_optimizer_in_a_module_object() -> None:
    inner = sgd()
    mod = engine(inner)

    def fn() -> None:
        mod.opt.step()

    assert inner in walk(fn, (), {}).optimizers.values()
    assert inner in watch(fn).roots.optimizers.values()


@pytest.mark.parametrize("make", [Item, More])
def test_slots_do_not_raise(make: Any) -> None:
    items = [make(torch.ones(2)), make(torch.ones(2))]
    r = roots(items, make(torch.ones(3)), {"k": make(torch.ones(1))})
    assert {tuple(t.shape) for t in r.at.values()} == {(1,), (2,), (3,)} and len(r.at) == 4
    assert ("args", 1, ".n") in r.volatile


def test_batches_of_named_tuples() -> None:
    items = [Pair(torch.ones(2), torch.ones(1)) for _ in range(3)]
    r = roots(items)
    assert r.batches == {("args", 0): items} and len(r.at) == 6
    assert [k for k in r.key if k[0] == ("args", 0)] == [k for k in roots(items[:2]).key if k[0] == ("args", 0)]


class Counting:
    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.at += 1
        return self.at


def test_iterators_are_found_wherever_they_are() -> None:
    its = [iter([1]), (i for i in range(3)), Counting(), zip([1], [2], strict=True), enumerate([1])]
    o = types.SimpleNamespace(it=its[0])
    o.deep = {"k": [its[1], (its[2],)]}

    def fn(o: Any) -> Any:
        return next(its[4])

    r = walk(fn, (o, {"z": its[3]}), {})
    assert {id(i) for i in r.iterators.values()} == {id(i) for i in its}
    assert all(k[1:] == ("iterator",) for k in r.key if k[0] in r.iterators)
    before = r.key
    next(its[2])  # where it stands does not count: it is drawn from
    assert walk(fn, (o, {"z": its[3]}), {}).key == before


def test_a_loader_counts_without_its_sampler() -> None:
    data = TensorDataset(torch.arange(4.0))
    loader = DataLoader(data, batch_size=2, shuffle=True, generator=torch.Generator())
    loader.sampler.epoch = 0  # type: ignore[attr-defined]
    before = roots(loader)
    loader.sampler.epoch = 1  # type: ignore[attr-defined]
    assert roots(loader).key == before.key and id(data.tensors[0]) in before.tensors
    assert any(isinstance(o, torch.Generator) for o in before.objects.values())


def test_memory_that_is_shared() -> None:
    flat = torch.randn(6)
    views = {"a": flat[:3], "b": flat[3:], "c": torch.randn(3), "flat": flat}
    shared = roots(views).shared
    assert sorted(map(len, shared.values())) == [1, 3]
    assert shared[flat.untyped_storage()._cdata] == [("args", 0, "a"), ("args", 0, "b"), ("args", 0, "flat")]


def test_sets_long_lists_and_arrays() -> None:
    s, long, table = {1, 2}, list(range(500)), {str(i): i for i in range(500)}
    a, obj = np.arange(10)[::2], np.array([1, "x", None], dtype=object)
    key = roots(s, long, table, a, obj).key
    assert len(key) < 20
    for change in (lambda: s.add(3), lambda: long.__setitem__(400, 0), lambda: table.pop("3"), lambda: a.sort()):
        change()
    a[0] = 9
    assert sum(x != y for x, y in zip(key, roots(s, long, table, a, obj).key, strict=True)) == 4
    assert {id(x) for x in roots(a, obj).arrays.values()} == {id(a), id(obj)}


def test_long_lists_of_names_and_labels_are_one_entry() -> None:
    data = [(f"{i}.png", i % 7) for i in range(2000)]
    key = roots(data).key
    assert len(key) < 5 and roots(list(data)).key == key
    data[1500] = ("other.png", 1)
    assert roots(data).key != key
    data[3] = ("x", torch.ones(1))  # type: ignore[assignment]
    assert len(roots(data).at) == 1


def test_large_arrays_are_sampled() -> None:
    big = np.zeros((66 << 20) // 8)
    key = roots(big).key
    assert roots(big).key == key
    big[:] = 1
    assert roots(big).key != key


def test_the_environment() -> None:
    os.environ["READS_FLAG"] = "1"

    def fn() -> Any:
        return os.environ["READS_FLAG"]

    w = watch(fn)
    os.environ["READS_OTHER"] = "1"
    assert w.again()
    os.environ["READS_FLAG"] = "2"
    assert not w.again()


def test_hooks_are_followed() -> None:
    scale = [1.0]
    m = nn.Linear(2, 2)
    m.register_forward_hook(lambda m, i, o: o * scale[0])
    w = watch(lambda x: m(x), torch.ones(2))
    assert w.again()
    scale[0] = 2.0
    assert not w.again()


def test_hooks_of_tensors_are_followed() -> None:
    scale = [1.0]
    p = torch.ones(2, requires_grad=True)
    handle = p.register_hook(lambda g: g * scale[0])
    w = watch(lambda x: torch.autograd.grad((p * x).sum(), p)[0], torch.ones(2))
    assert w.again()
    scale[0] = 2.0
    assert not w.again()
    scale[0] = 1.0
    assert w.again()
    handle.remove()
    assert not w.again()


def test_values_of_a_module_that_is_scripted_or_lazy() -> None:
    lazy = nn.LazyLinear(3)
    assert any(m is lazy for m in roots(lazy).modules.values())


def test_one_path_for_a_global_however_it_is_reached() -> None:
    def inner() -> Any:
        return HOLDERS

    def outer() -> Any:
        return inner(), HOLDERS["plain"]

    paths = [k[0] for k in walk(outer, (), {}).key if "HOLDERS" in k[0] and len(k[0]) == 3]
    assert len(paths) == 1 and paths[0][0] == "globals"


def test_optimizers_with_odd_groups() -> None:
    m = nn.Linear(2, 2)
    opt = Adam([{"params": [m.weight], "lr": 0.1}, {"params": [m.bias], "name": "b"}])
    r = roots(opt)
    assert ("args", 0, "param_groups", 1, "name") in r.volatile
    assert [id(m.weight), id(m.bias)] == list(r.tensors)
