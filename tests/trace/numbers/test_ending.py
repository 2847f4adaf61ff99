"""Once a recording is over its numbers are plain, wherever the user's objects keep them."""

import collections
import dataclasses

import numpy as np

from mlc.trace.numbers.ending import observed, retire, settle
from mlc.trace.numbers.links import Linked
from tests.trace.numbers.ledger import FakeLedger


@dataclasses.dataclass(slots=True)
class Slotted:
    best: object


class Meter:
    def __init__(self, value):
        self.value, self.history = value, [value]


Pair = collections.namedtuple("Pair", "a b")


def holders(v):
    return {
        "list": [v, 1], "dict": {"a": {"b": v}}, "tuple": ((v, 2), [v]), "pair": Pair(v, 1), "set": {v},
        "deque": collections.deque([v], maxlen=3), "meter": Meter(v), "slots": Slotted((v,)), "key": {v: 1},
        "array": np.array([None, v], dtype=object), "closure": (lambda: v),
        "default": collections.defaultdict(list, a=[v]),
    }  # fmt: skip


def left(x, seen=None):
    """Numbers that an object still leads to."""
    seen = set() if seen is None else seen
    if isinstance(x, Linked):
        return 1
    if id(x) in seen or isinstance(x, (str, type)):
        return 0
    seen.add(id(x))
    parts = []
    if isinstance(x, dict):
        parts = [*x, *x.values()]
    elif isinstance(x, (list, tuple, set, collections.deque)):
        parts = list(x)
    elif isinstance(x, np.ndarray):
        parts = x.tolist()
    elif callable(x):
        parts = [c.cell_contents for c in x.__closure__]
    elif isinstance(x, Slotted):
        parts = [x.best]
    elif isinstance(x, Meter):
        parts = list(vars(x).values())
    return sum(left(y, seen) for y in parts)


def test_settle_replaces_in_place():
    v = FakeLedger().number(0.5)
    x = holders(v)
    before = {k: y for k, y in x.items() if k not in ("tuple", "pair")}
    assert left(x) > 10
    assert settle(x) is x and left(x) == 0
    assert all(x[k] is y for k, y in before.items())
    assert x["pair"] == Pair(0.5, 1) and type(x["pair"]) is Pair and x["closure"]() == 0.5
    assert settle(v) == 0.5 and type(settle(v)) is float and settle([x])[0] is x


def test_observed_copies_only_what_holds_numbers():
    v = FakeLedger().number(0.5)
    inner, log = [1, 2], collections.OrderedDict(a=v)
    tree = {"x": inner, "log": log, "twice": [log, log]}
    out = observed(tree)
    assert out == {"x": [1, 2], "log": {"a": 0.5}, "twice": [{"a": 0.5}] * 2} and out["x"] is inner
    assert type(out["log"]) is collections.OrderedDict and out["twice"][0] is out["twice"][1] is out["log"]
    assert tree["log"]["a"] is v and observed(inner) is inner
    loop = [1]
    loop.append(loop)
    assert observed(loop) is loop


HELD = {}


def test_retire_finds_what_no_walk_reaches():
    ledger, other = FakeLedger(), FakeLedger()
    stays = other.number(2.0)
    HELD.update({k: y for k, y in holders(ledger.number(0.5)).items() if k != "array"})
    x = (1, (ledger.number(0.25), 2))
    HELD["nested"] = [x]
    del x
    assert retire(ledger) == 0
    assert left(HELD) == 0 and HELD["nested"] == [(1, (0.25, 2))] and HELD["meter"].history == [0.5]
    assert stays.ledger is other
    HELD.clear()


def test_what_cannot_be_replaced_answers_by_value():
    ledger = FakeLedger()

    def generator():
        v = ledger.number(0.5)
        yield
        yield v + 1

    g = generator()
    next(g)
    assert retire(ledger) == 1
    assert next(g) == 1.5 and ledger.guards == []
