"""The user's objects are put back exactly after a failing call, whatever the call did to them."""

import array
import collections
import dataclasses
import functools
import random
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR

from mlc.trace.python.inputs import walk
from mlc.trace.python.world import World
from tests.trace.python.graphs import Both, Slotted, graph, link, picture, unlink


class Weird:
    """Everything that must not be touched by looking."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.file = open("/dev/null")  # noqa: SIM115
        self.ref = weakref.ref(self)
        self.n = 1

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")

    @property
    def bad(self) -> Any:
        raise AssertionError("evaluated")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    def __hash__(self) -> int:
        return 1


def check(setup: Callable[[], Any], change: Callable[[Any], Any]) -> None:
    x = setup()

    def fn(x: Any) -> None:
        change(x)

    world = World(walk(fn, (x,), {}))
    before, states = picture(x), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    fn(x)
    torch.rand(1), random.random(), np.random.rand()
    world.restore()
    assert picture(x) == before
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def containers() -> Any:
    return {
        "list": [1, [2], {"k": 3}], "dict": collections.OrderedDict(a=1, b=[1]), "set": {1, 2},
        "deque": collections.deque([1, 2, 3], maxlen=3), "bytes": bytearray(b"abc"),
        "count": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]), "tuple": ([1], {2}), "array": np.arange(5),
    }  # fmt: skip


def empty_all(x: Any) -> None:
    for v in [x["list"], x["dict"], x["set"], x["deque"], x["count"], x["default"]]:
        v.clear()
    x["tuple"][0].append(2)
    x["tuple"][1].add(5)
    x["bytes"][:] = b"z"
    x["array"][:] = 7
    x["new"] = 1
    del x["list"]


def grow_all(x: Any) -> None:
    x["list"][1].append(1)
    x["list"].insert(0, 5)
    x["dict"].move_to_end("a")
    x["dict"]["b"].clear()
    x["deque"].append(9)
    x["count"]["z"] += 1
    x["default"]["q"].append(1)
    x["bytes"] += b"x"
    np.random.default_rng(0).shuffle(x["array"])


def test_containers() -> None:
    check(containers, empty_all)
    check(containers, grow_all)


@pytest.mark.parametrize("cls", [Slotted, Both])
def test_slots(cls: type) -> None:
    def change(x: Any) -> None:
        x.touch()
        del x.a
        x.c = 4
        if cls is Both:
            x.d["x"], x.e = 2, 3
            del x.d

    check(cls, change)


def test_dataclasses_with_slots() -> None:
    @dataclasses.dataclass(slots=True)
    class Item:
        x: torch.Tensor
        n: int = 0

    def change(items: list[Item]) -> None:
        items[0].n = 5
        items[1].x = torch.zeros(1)
        items.pop()

    check(lambda: [Item(torch.ones(2)), Item(torch.ones(2))], change)


def test_odd_objects_are_left_alone() -> None:
    x = Weird()
    world = World(walk(lambda w: None, (x,), {}))
    x.n = 2
    world.restore()
    assert x.n == 1 and not x.file.closed
    x.file.close()


def test_functions_classes_globals_and_cells() -> None:
    class Conf:
        scale, table = 1, [1]

    count, box = 0, [1]

    def helper() -> None:
        nonlocal count
        count += 1
        Conf.scale = 2
        Conf.table.append(2)
        Conf.new = 3  # type: ignore[attr-defined]
        helper.calls = 1  # type: ignore[attr-defined]
        box.append(2)

    world = World(walk(helper, (), {}))
    helper()
    world.restore()
    assert (count, box, Conf.scale, Conf.table) == (0, [1], 1, [1])
    assert not hasattr(Conf, "new") and not hasattr(helper, "calls")


def training() -> Any:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    opt = Adam(m.parameters(), lr=0.1)
    return {"m": m, "opt": opt, "turn": StepLR(opt, 1), "g": torch.Generator().manual_seed(3),
            "np": np.random.default_rng(0), "py": random.Random(1), "x": torch.randn(4, 2)}  # fmt: skip


def step(x: Any) -> None:
    x["opt"].zero_grad()
    x["m"](x["x"]).square().mean().backward()
    x["opt"].step()
    x["turn"].step()
    torch.rand(1, generator=x["g"]), x["np"].random(), x["py"].random()


def replace_head(x: Any) -> None:
    step(x)
    x["m"][2] = nn.Linear(3, 1)
    x["m"].extra = torch.ones(2)
    x["m"].register_buffer("count", torch.zeros(()))
    x["m"][0].register_forward_hook(lambda *a: None)
    x["m"].eval()
    x["opt"].add_param_group({"params": [torch.ones(1, requires_grad=True)]})


def prune_and_freeze(x: Any) -> None:
    step(x)
    prune.l1_unstructured(x["m"][0], "weight", amount=0.5)
    x["m"][2].weight.requires_grad_(False)
    x["m"][2].bias.data = torch.ones(1)
    x["m"][1].weight.register_hook(lambda g: g)
    x["m"].load_state_dict(x["m"].state_dict())
    x["opt"].load_state_dict(x["opt"].state_dict())
    x["m"].double()


@pytest.mark.parametrize("change", [step, replace_head, prune_and_freeze])
@pytest.mark.parametrize("steps", [0, 1])
def test_modules_optimizers_generators(change: Callable[[Any], None], steps: int) -> None:
    def setup() -> Any:
        x = training()
        for _ in range(steps):
            step(x)
        return x

    check(setup, change)
    x = setup()
    world = World(walk(change, (x,), {}))
    draws = torch.rand(1, generator=x["g"]), x["np"].random(), x["py"].random()
    change(x)
    world.restore()
    assert (torch.rand(1, generator=x["g"]), x["np"].random(), x["py"].random()) == draws


def test_tensors_in_place() -> None:
    """Not the elements (the recorder's), but that they are leaves again."""

    def change(x: Any) -> None:
        w = torch.ones(3, requires_grad=True)
        x["t"].mul_(w)
        x["u"].requires_grad_()
        x["v"].grad = torch.ones(3)
        x["v"].data = x["v"].data.double()

    check(lambda: {"t": torch.ones(3), "u": torch.ones(3), "v": torch.ones(3, requires_grad=True)}, change)


def test_a_world_is_a_view_of_before() -> None:
    state = {"k": 1, "l": [1, 2]}
    p = torch.ones(2, requires_grad=True)

    def fn(state: Any, p: torch.Tensor) -> None:
        state["k"] = 2
        state["l"].append(3)
        p.requires_grad_(False)

    first = walk(fn, (state, p), {})
    world = World(first)
    fn(state, p)
    assert walk(fn, (state, p), {}, before=world).key == first.key
    assert walk(fn, (state, p), {}).key != first.key


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int) -> None:
    rng = random.Random(seed)

    def change(objects: list[Any]) -> None:
        for _ in range(30):
            rng.choice([functools.partial(link, new=True), unlink])(rng, objects)

    check(lambda: graph(rng, 14), change)


def test_iterators_with_a_place_of_their_own() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.at, self.log = 0, []

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            self.at += 1
            self.log.append(self.at)
            return self.at

    def change(x: Any) -> None:
        next(x["it"]), next(x["o"].it)

    check(lambda: {"it": Cycle(), "o": types.SimpleNamespace(it=Cycle())}, change)


def test_arrays_of_python() -> None:
    x = array.array("d", [1.0, 2.0])
    World(walk(lambda a: a, (x,), {})).restore()
    assert list(x) == [1.0, 2.0]


def test_lazy_modules_are_lazy_again() -> None:
    m = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    world = World(walk(lambda m: None, (m,), {}))
    m(torch.ones(2, 5))
    assert type(m[0]) is nn.Linear
    world.restore()
    assert type(m[0]) is nn.LazyLinear and isinstance(m[0].weight, nn.UninitializedParameter)
    assert m(torch.ones(2, 4)).shape == (2, 3)
