"""Python's libraries meet numbers of a recording: the link is kept, guarded, or the plain number is written."""

import collections
import io
import json
import math
import statistics
import sys
import types
from statistics import mean as imported_mean

import numpy as np
import pytest
import torch

from mlc.trace.numbers.links import Linked
from mlc.trace.numbers.patches import followed
from tests.trace.numbers.ledger import FakeLedger


@pytest.mark.parametrize(
    "name", ["sqrt", "exp", "log", "log2", "log10", "log1p", "expm1", "fabs", "sin", "cos", "tanh"]
)
def test_math_keeps_the_link(name):
    ledger, f = FakeLedger(), getattr(math, name)
    with followed():
        for v in (0.7, 3, 2.5):
            r = getattr(math, name)(ledger.number(v))
            assert isinstance(r, Linked) and r.value == f(v) and abs(r.tensor.item() - f(v)) <= 1e-12
        assert getattr(math, name)(0.7) == f(0.7) and getattr(math, name)(torch.tensor(0.5)) == f(0.5)
    assert getattr(math, name) is f and set(ledger.outcomes()) <= {True}


@pytest.mark.parametrize("v", [-1.0, 0.0, 1e308, math.inf, math.nan, -math.inf])
def test_math_outside_its_domain_is_eagers_and_guarded(v):
    for name in ("sqrt", "exp", "log", "log10", "sin", "tanh"):
        ledger, f = FakeLedger(), getattr(math, name)
        with followed():
            try:
                want = f(v)
            except (ValueError, OverflowError) as e:
                with pytest.raises(type(e)):
                    getattr(math, name)(ledger.number(v))
                assert len(ledger.guards) == 1 and str(ledger.outcomes()[0]) == str(v)
            else:
                got = getattr(math, name)(ledger.number(v))
                assert str(got) == str(want) and (isinstance(got, Linked) or ledger.guards)


def test_math_with_two_arguments_and_questions():
    ledger = FakeLedger()
    v = ledger.number(2.0)
    with followed():
        assert math.log(v, 10).tensor.item() == pytest.approx(math.log(2, 10), rel=1e-14)
        assert math.pow(v, 3) == 8.0 and math.pow(0.5, v).tensor.item() == 0.25
        ledger.guards.clear()
        assert math.isfinite(v) is True and math.isnan(v) is False and math.isinf(v) is False
        assert ledger.outcomes() == [True, False, False]
        assert math.floor(v) == 2 and math.hypot(v, 0) == 2.0
        assert math.log(10, 10) == math.log(10, 10) and math.isfinite(3)


def test_means_keep_the_link():
    ledger = FakeLedger()
    xs = [ledger.number(float(v)) for v in (1.0, 4.0, 2.5)]
    plain, kept = [1.0, 4.0, 2.5], [np.mean, np.std, np.median, np.max, np.sum, np.average, np.var, np.min]
    kept += [statistics.mean, statistics.fmean, statistics.stdev, statistics.median, statistics.variance]
    with followed():
        for f in kept:
            owner = np if f.__module__.startswith("numpy") else statistics
            for data in (xs, tuple(xs), collections.deque(xs)):
                r = getattr(owner, f.__name__)(data)
                assert isinstance(r, Linked) and r.value == f(plain) and type(r.value) is type(f(plain))
                assert r.tensor.item() == pytest.approx(f(plain), rel=1e-13)
        assert statistics.mean(x for x in xs) == statistics.mean(plain)
        ledger.guards.clear()
        assert np.mean(xs, axis=0) == 2.5 and ledger.outcomes() == plain
        assert np.mean([1.0, 2.0]) == 1.5 and np.sum(np.ones(3)) == 3
        assert np.mean(np.array([[1.0, 2.0]]), axis=1)[0] == 1.5


def test_a_mean_imported_earlier_is_guarded():
    ledger = FakeLedger()
    with followed():
        assert imported_mean([ledger.number(0.5), ledger.number(1.5)]) == 1.0
        assert imported_mean([ledger.number(0.5), 1.5]) == 1.0
    assert ledger.outcomes() == [0.5, 1.5, 0.5]


class Odd(json.JSONEncoder):
    def default(self, o):
        return f"odd {type(o).__name__}"


@pytest.mark.parametrize("options", [{}, {"indent": 1}, {"default": str}, {"cls": Odd}, {"sort_keys": True}])
def test_json_is_the_text_of_the_plain_numbers(options):
    ledger = FakeLedger()
    v, n, b = ledger.number(0.1), ledger.number(3), ledger.number(True)
    nan, log = ledger.number(math.nan), collections.OrderedDict
    with followed():
        got = json.dumps({"a": [v, n, (b, nan)], "b": log(c=v), "d": {"e": {1: n}}}, **options)
        out = io.StringIO()
        json.dump([v, {"n": n}], out, **options)
    assert got == json.dumps({"a": [0.1, 3, (True, math.nan)], "b": log(c=0.1), "d": {"e": {1: 3}}}, **options)
    assert out.getvalue() == json.dumps([0.1, {"n": 3}], **options) and ledger.guards == []


def test_what_a_users_default_gives_is_written_plain():
    class Meter:
        def __init__(self, value):
            self.value = value

    ledger = FakeLedger()
    with followed():
        assert json.dumps([Meter(ledger.number(0.5))], default=vars) == '[{"value": 0.5}]'


def test_a_checkpoint_can_be_read_as_weights_only(tmp_path):
    ledger = FakeLedger()
    state = {"loss": ledger.number(0.5), "epochs": [ledger.number(3)], "w": torch.ones(2)}
    with followed():
        torch.save(state, tmp_path / "a.pt")
    back = torch.load(tmp_path / "a.pt")
    assert back["loss"] == 0.5 and type(back["loss"]) is float and back["epochs"] == [3]
    assert isinstance(state["loss"], Linked) and ledger.guards == []


def test_a_logger_that_makes_arrays_only_writes(monkeypatch):
    class SummaryWriter:
        def add_scalar(self, tag, value, step=None):
            self.seen = np.array([value]), step

    monkeypatch.setitem(sys.modules, "tensorboardX.writer", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    ledger, writer = FakeLedger(), SummaryWriter()
    with followed():
        writer.add_scalar("loss", ledger.number(0.5), step=ledger.number(3))
    assert writer.seen == (0.5, 3) and ledger.guards == []
