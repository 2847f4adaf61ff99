"""``float(loss)`` in user code keeps its link, and the stand-in for the class is not noticed otherwise."""

import collections
import contextlib
import pickle
import types

import numpy as np
import pytest
import torch
from torch import Tensor

from mlc.trace.numbers.links import Linked
from mlc.trace.numbers.mode import NumberMode
from mlc.trace.numbers.number import take
from mlc.trace.numbers.types import conversions
from tests.trace.numbers.ledger import FakeLedger


@contextlib.contextmanager
def recorded(ledger, monkeypatch):
    base = torch._C.TensorBase.item
    with monkeypatch.context() as m:
        m.setattr(Tensor, "item", lambda t: take(t, ledger) if ledger.recording else base(t), raising=False)
        yield


def module(source, monkeypatch, use):
    """What ``use(x)`` of a module of the user gives while recording."""
    scope = types.ModuleType("user").__dict__
    exec(source, scope)
    ledger = FakeLedger()
    with recorded(ledger, monkeypatch), NumberMode(), conversions([scope]):
        result = use(scope)
    assert "float" not in scope and "int" not in scope and "max" not in scope
    return result, ledger


SOURCE = """
import collections, numpy as np, torch
def as_float(x): return float(x)
def as_int(x): return int(x)
def check(x): return isinstance(x, float), isinstance(x, (int, float)), type(x) == float, type(x) in (int, float)
def kinds(): return issubclass(np.float64, float), issubclass(bool, int), {float: 1, int: 2}[type(2.0)]
def arrays(): return np.zeros(2, dtype=float).dtype, np.ones(2).astype(int).dtype, np.dtype(float) == float
def tensors():
    return torch.zeros(2, dtype=float).dtype, torch.ones(2).to(int).dtype, torch.tensor([1], dtype=float).dtype
def made():
    counts = collections.defaultdict(float)
    return counts, float("1.5"), int("ff", 16), float(), float.fromhex("0x1p-1"), list(map(float, "12"))
def names(): return float, repr(float), str(int), float.__name__
class Kind:
    def best(self, a, b):
        return max(a, b), min(a, b), max([a, b]), max([1, 2], key=lambda v: -v), max(1, 2.5), min([], default=3)
def derived():
    class Degrees(float):
        pass
    return Degrees(1.5), isinstance(Degrees(2), float), isinstance(2.0, Degrees)
def matched(x):
    match x:
        case int(): return "int"
        case float(v): return v
"""


def test_float_and_int_of_tensors_and_numbers_keep_the_link(monkeypatch):
    def use(scope):
        t = torch.tensor([[2.75]])
        return scope["as_float"](t), scope["as_int"](t), scope["as_float"](scope["as_int"](t)), scope["as_int"](True)

    (a, b, c, d), ledger = module(SOURCE, monkeypatch, use)
    assert ledger.reasons() == {"whether int is defined"}
    assert all(isinstance(x, Linked) for x in (a, b, c)) and (a.value, b.value, c.value, d) == (2.75, 2, 2.0, 1)
    assert [x.tensor.item() for x in (a, b, c)] == [2.75, 2, 2.0] and type(c.value) is float


def test_the_stand_in_goes_for_the_class(monkeypatch):
    def use(scope):
        return [scope[f]() for f in ("kinds", "arrays", "tensors", "made", "names", "derived")], scope["check"](1.5)

    (results, check), _ = module(SOURCE, monkeypatch, use)
    kinds, arrays, tensors, made, names, derived = results
    assert check == (True,) * 4 and kinds == (True, True, 1)
    assert arrays == (np.float64, np.int64, True) and tensors == (torch.float64, torch.int64, torch.float64)
    assert made[1:] == (1.5, 255, 0.0, 0.5, [1.0, 2.0]) and all(type(x) is not Linked for x in made[1:])
    assert made[0]["a"] == 0.0 and type(made[0]["a"]) is float
    assert pickle.loads(pickle.dumps(made[0])).default_factory is float
    assert names[1:] == ("<class 'float'>", "<class 'int'>", "float") and names[0] == float  # noqa: E721
    assert derived[0] == 1.5 and derived[1] and not derived[2]


def test_class_patterns_match(monkeypatch):
    out, _ = module(SOURCE, monkeypatch, lambda scope: [scope["matched"](x) for x in (1.5, 2)])
    assert out == [1.5, "int"]


def test_max_and_min_keep_the_link_between_numbers_of_one_type(monkeypatch):
    ledger = FakeLedger()
    a, b = ledger.number(0.5), ledger.number(2.0)
    out, _ = module(SOURCE, monkeypatch, lambda scope: scope["Kind"]().best(a, b))
    assert ledger.guards == [] and [x.value for x in out[:3]] == [2.0, 0.5, 2.0] and out[3:] == (1, 2.5, 3)
    assert out[0].tensor.item() == 2.0
    out, _ = module(SOURCE, monkeypatch, lambda scope: scope["Kind"]().best(a, 3))
    assert len(ledger.guards) == 3 and out[:2] == (3, 0.5)  # an int or a float, by the comparisons


@pytest.mark.parametrize("source", ["def f(x): return type(x) is float\n", "def f(x): return float is type(x)\n"])
def test_a_module_that_compares_by_identity_is_left_alone(source, monkeypatch):
    source += "def g(x): return float(x)\n"
    (a, b), _ = module(source, monkeypatch, lambda scope: (scope["f"](1.5), scope["g"](ledger_number(scope))))
    assert a is True and type(b) is float


def ledger_number(scope):
    return scope.setdefault("n", FakeLedger().number(0.5))


def test_a_module_keeps_a_name_of_its_own(monkeypatch):
    source = "def max(a, b): return 'mine'\ndef f(a, b): return max(a, b)\n"
    scope = types.ModuleType("user").__dict__
    exec(source, scope)
    with conversions([scope]):
        assert scope["f"](1, 2) == "mine"
    assert scope["max"](1, 2) == "mine"


def test_a_stand_in_that_lives_on_is_the_class(monkeypatch):
    (counts, *_), ledger = module(SOURCE, monkeypatch, lambda scope: scope["made"]())
    ledger.recording = False
    counts["loss"] += 0.5
    assert counts == collections.defaultdict(float, loss=0.5, **({"a": 0.0} if "a" in counts else {}))
    assert counts.default_factory(torch.tensor(2)) == 2.0 and type(counts.default_factory(torch.tensor(2))) is float


def test_a_text_that_becomes_a_number_again_is_guarded(monkeypatch):
    ledger = FakeLedger()
    v, w = ledger.number(0.123456), ledger.number(7.5)
    texts = [f"{v:.3f}", "%.2e" % v, str(w)]  # noqa: UP031
    out, _ = module(SOURCE, monkeypatch, lambda scope: [scope["as_float"](t) for t in texts])
    assert ledger.outcomes() == [0.123456, 7.5] and out == [0.123, 0.123, 7.5]
