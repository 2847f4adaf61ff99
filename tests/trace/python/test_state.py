"""What a call changed, applied to the objects of a later call, leaves them as the call would have left them."""

import collections
import copy
import dataclasses
import functools
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from mlc.compiled.commit import commit
from mlc.trace.python.inputs import walk
from mlc.trace.python.state import Fresh, parts
from tests.trace.python.graphs import graph, link, picture, unlink
from tests.trace.python.watched import Watched, watch


def difference(a: Any, b: Any, at: str = "") -> str | None:
    """Where two pictures differ."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        found = (
            difference(x, y, f"{at}/{x[0] if isinstance(x, tuple) and x else i}")
            for i, (x, y) in enumerate(zip(a, b, strict=True))
        )
        return next((f for f in found if f is not None), None)
    return None if a == b else f"{at}: {a!r:.200} and {b!r:.200}"


def same_after(setup: Callable[[], Any], change: Callable[[Any], Any]) -> Watched:
    """A call on one copy, its changes on another: no difference."""

    def fn(x: Any) -> None:
        change(x)

    mine, other = setup(), setup()
    w = watch(fn, mine)
    now = walk(fn, (other,), {}, w.found)
    with torch.no_grad():
        for path, t in now.at.items():
            was = w.roots.at[path]
            if (
                was.shape == t.shape
                and was.dtype == t.dtype
                and not any(c.owner is was for c in w.changes.all if c.kind == "data")
            ):
                t.copy_(was)  # in-place writes are the program's results
    commit(w.changes.all, [], now, set())
    assert difference(picture(other, ids=False), picture(mine, ids=False)) is None
    return w


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed: int) -> None:
    rng = random.Random(seed)

    def change(objects: list[Any]) -> None:
        known = list(objects)
        for _ in range(12):
            rng.choice([functools.partial(link, new=True), unlink])(rng, known)

    def setup() -> Any:
        return graph(random.Random(1000 + seed), 10)

    same_after(setup, change)


def training() -> Any:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    opt = Adam(m.parameters(), lr=0.1)
    x = torch.randn(4, 2)
    return types.SimpleNamespace(m=m, opt=opt, turn=StepLR(opt, 1, 0.5), x=x, log=[], best=None, table={})


def step(s: Any) -> None:
    s.opt.zero_grad()
    loss = s.m(s.x).square().mean()
    loss.backward()
    s.opt.step()
    s.turn.step()
    s.log.append(loss.item())


def replace_head(s: Any) -> None:
    step(s)
    s.m[2] = nn.Linear(3, 1)
    s.opt = SGD(s.m.parameters(), lr=0.1, momentum=0.9)
    s.turn = None
    s.opt.zero_grad()
    s.m(s.x).mean().backward()
    s.opt.step()
    s.m.extra = torch.ones(2)
    s.m.register_buffer("count", torch.zeros(()))


def freeze(s: Any) -> None:
    step(s)
    s.m[2].weight.requires_grad_(False)
    s.m[2].bias.data = torch.full((1,), 3.0)
    s.m[0].bias.data = s.m[0].bias.data.double()
    s.m[0].weight.grad = None
    s.m.eval()


def pruned(s: Any) -> None:
    step(s)
    prune.l1_unstructured(s.m[0], "weight", amount=0.5)
    s.opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.3})
    s.opt.param_groups[1]["params"][0].grad = torch.ones(2)
    s.opt.step()


def keep_best(s: Any) -> None:
    step(s)
    s.best = copy.deepcopy(s.m.state_dict())
    s.table["losses"] = {"train": [1.0, 2.0], "last": (s.x, torch.ones(1))}
    s.table["model"] = s.m
    s.half = s.x[:2]


@pytest.mark.parametrize("change", [step, replace_head, freeze, pruned, keep_best])
@pytest.mark.parametrize("steps", [0, 2])
def test_training(change: Callable[[Any], None], steps: int) -> None:
    def setup() -> Any:
        s = training()
        for _ in range(steps):
            step(s)
        return s

    w = same_after(setup, change)
    assert not w.changes.odd


def test_state_keeps_its_dtype() -> None:
    s = training()
    w = watch(lambda s: step(s), s)
    fresh = [c.value for c in w.changes.all if c.kind == "state"]
    assert fresh and all(isinstance(f, Fresh) and f.dtype is torch.float32 for f in fresh)
    other = training()
    wide = [dataclasses.replace(c, value=_double(c.value)) for c in w.changes.all if c.kind == "state"]
    commit(wide, [], walk(w.fn, (other,), {}, w.found), set())
    assert all(v.dtype is torch.float32 for held in other.opt.state.values() for v in held.values())


def _double(f: Fresh) -> Fresh:
    return Fresh(f.value.double(), f.dtype)


class Trainer:
    epochs = 2

    def __init__(self) -> None:
        self.n = 0
        self.read = 0
        self.log: list[float] = []
        self.seen: list[float] = []
        self.last = 0.0
        self.sums: dict[str, float] = collections.defaultdict(float)
        self.names: set[str] = set()
        self.recent: collections.deque[float] = collections.deque(maxlen=2)
        self.scale = 1.0

    def run(self, x: torch.Tensor) -> Any:
        out = x.sum() * self.scale
        for _ in range(self.epochs):
            self.n += 1
            self.read += 1
            self.log.append(3.0)
            self.seen.append(1.0)
            self.last = 5.0
            self.sums["loss"] += 2.0
            self.names.add("a")
            self.recent.append(4.0)
        if self.read > 100 or len(self.seen) > 100:
            out = out * 2
        return out


def test_what_is_only_written_may_differ() -> None:
    t = Trainer()
    w = watch(t.run, torch.ones(2))
    assert w.changes.ignored and not w.changes.odd
    assert len(w.changes.counters) == 1 and w.changes.counters[0].endswith(".read")  # named in the note
    assert not w.again()  # .read and .seen were read
    t.read, t.seen[:] = 0, []
    assert w.again()
    t.scale = 2.0
    assert not w.again()


def test_counters_go_on() -> None:
    t = Trainer()
    w = watch(t.run, torch.ones(2))
    t.n, t.sums["loss"], t.last = 10, 0.5, 0.0
    w.commit(torch.ones(2))
    assert (t.n, t.sums["loss"], t.last) == (12, 4.5, 5.0)
    assert t.log == [3.0] * 4 and list(t.recent) == [4.0, 4.0] and t.names == {"a"}


def test_what_is_copied_was_read() -> None:
    @dataclasses.dataclass
    class Meter:
        n: int = 0
        log: list[int] = dataclasses.field(default_factory=list)

        def up(self) -> None:
            self.n += 1
            self.log.append(1)

    copies: list[Callable[[Any], Any]] = [
        lambda m: None, copy.deepcopy, copy.copy, dataclasses.asdict, lambda m: dataclasses.replace(m),
    ]  # fmt: skip
    for k, how in enumerate(copies):

        def fn(m: Meter, how: Any = how) -> Any:
            m.up()
            return how(m)

        w = watch(fn, Meter())
        assert w.again(Meter(5)) == (k == 0)


def test_a_log_that_is_made_by_the_call_is_recorded_again() -> None:
    table: dict[str, list[int]] = {}
    other: dict[str, list[int]] = collections.defaultdict(list)

    def fn() -> None:
        table.setdefault("loss", []).append(1)
        other["loss"].append(1)

    w = watch(fn)
    assert not w.again()
    w = watch(fn)
    w.commit()
    assert other["loss"] == [1, 1, 1]


def test_globals_cells_classes_and_functions() -> None:
    total, last = 0, 0

    class Conf:
        count = 0

    def fn() -> None:
        nonlocal total, last
        total += 1
        last = 4
        Conf.count += 1
        fn.calls = 3  # type: ignore[attr-defined]

    w = watch(fn)
    assert w.again()
    last = Conf.count = 0
    del fn.calls  # type: ignore[attr-defined]
    w.commit()
    assert (last, Conf.count, fn.calls) == (4, 1, 3)  # type: ignore[attr-defined]
    assert total == 2


def test_what_cannot_be_built_again_is_named() -> None:
    def fn(o: Any) -> None:
        w = torch.ones(1)
        o.made = lambda: w
        o.running = (i for i in range(3))

    w = watch(fn, types.SimpleNamespace())
    assert sorted(w.changes.odd) == ["o.made", "o.running"]


def test_rebound_objects_are_changed_where_they_now_stand() -> None:
    o = types.SimpleNamespace(meter=types.SimpleNamespace(n=0), m=nn.Linear(1, 1))

    def fn(o: Any) -> None:
        o.meter.n = 3
        o.same = o.m

    w = watch(fn, o)
    later = types.SimpleNamespace(meter=types.SimpleNamespace(n=7), m=nn.Linear(1, 1))
    w.commit(later)
    assert later.meter.n == 3 and o.meter.n == 3 and later.same is later.m


def test_one_new_object_in_two_places_stays_one() -> None:
    def fn(o: Any) -> None:
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.full((2,), 2.0)
        o.a, o.b = [p], {"p": p, "me": o}

    o = types.SimpleNamespace()
    w = watch(fn, o)
    later = types.SimpleNamespace()
    w.commit(later)
    assert later.a[0] is later.b["p"] and later.b["me"] is later and later.a[0] is not o.a[0]
    assert isinstance(later.a[0], nn.Parameter) and later.a[0].grad.tolist() == [2.0, 2.0]
    leaves = [x for c in w.changes.all for x in parts(c.value) if isinstance(x, torch.Tensor)]
    assert {id(x) for x in leaves} == {id(o.a[0]), id(o.a[0].grad)}
