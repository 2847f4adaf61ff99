"""A number of a recording is Python's number in everything; its tensor follows, or a guard says that it does not."""

import copy
import datetime
import decimal
import fractions
import logging
import math
import numbers
import operator
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlc.trace.numbers.links import Linked
from mlc.trace.numbers.number import Number, escape, numbers_of, take
from tests.trace.numbers.ledger import FakeLedger

BINARY = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift, divmod,
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
]  # fmt: skip
UNARY = [
    operator.neg, operator.pos, abs, round, math.floor, math.ceil, math.trunc, bool, float, int, complex,
    lambda x: x != x or hash(x),
    operator.index, operator.invert, lambda x: round(x, 2), lambda x: round(x, 0), lambda x: round(x, -1), str, repr,
    lambda x: x.is_integer(), lambda x: x.as_integer_ratio(), lambda x: x.conjugate(), lambda x: (x.real, x.imag),
    lambda x: x.hex(), lambda x: x.bit_length(), lambda x: x.numerator, lambda x: f"{x:.3f}", lambda x: f"{x:>12}",
    lambda x: f"{x:d}", lambda x: f"{x!r}", lambda x: "%.2e" % x, lambda x: "%d|%s" % (x, x), lambda x: "%x" % x,  # noqa: UP031
    lambda x: f"{x:g}", lambda x: [10, 20, 30, 40][x], lambda x: list(range(x)), lambda x: "a" * x,
    math.sqrt, math.exp, math.log, lambda x: pow(x, 2, 5), lambda x: sorted([x, 1, 0.5]), lambda x: max(x, 2),
    lambda x: sum([x, x, 1]), lambda x: x in (1, 3), lambda x: x != x or {x: 1}[x], lambda x: x == None,  # noqa: E711
]  # fmt: skip
VALUES = [0.7, -2.5, 3.0, 0.0, 1e300, math.inf, -math.inf, math.nan, 3, -7, 0, 12345, True, False, 1.5 - 2j]
CONSTANTS = [2, -3, 0, 2.5, -0.5, 0.0, True, 1j, 10**30, math.inf, fractions.Fraction(1, 3)]


def plain(x):
    if isinstance(x, Linked):
        assert agrees(x)
        return x.value
    if isinstance(x, (list, tuple)):
        return type(x)(plain(y) for y in x)
    return x


def agrees(x):
    held = x.tensor.item()
    assert x.tensor.dim() == 0
    near = held == x.value or (held != held and x.value != x.value)
    return near or abs(held - x.value) <= 1e-12 * max(1, abs(x.value))


def outcome(f, *args):
    try:
        r = f(*args)
    except Exception as e:
        return type(e)
    return plain(r)


def same(a, b):
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (repr(a) == repr(b) or a == b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("f", UNARY)
def test_unary_and_every_use_equal_the_plain_number(f):
    for v in VALUES:
        ledger = FakeLedger()
        assert same(outcome(f, ledger.number(v)), outcome(f, v)), (v, f)


@pytest.mark.parametrize("f", BINARY)
def test_binary_equals_the_plain_number_on_both_sides(f):
    for v in VALUES:
        for c in [*CONSTANTS, *VALUES]:
            if f in (operator.lshift, operator.pow) and isinstance(c, int) and abs(c) > 1000:
                continue
            if f in (operator.lshift, operator.pow) and isinstance(v, int) and abs(v) > 1000:
                continue
            ledger = FakeLedger()
            n, m = ledger.number(v), c if isinstance(c, fractions.Fraction) or c == 10**30 else ledger.number(c)
            assert same(outcome(f, n, c), outcome(f, v, c)), (f, v, c)
            assert same(outcome(f, c, n), outcome(f, c, v)), (f, c, v)
            assert same(outcome(f, n, m), outcome(f, v, c)), (f, v, c)


LEAF = st.one_of(
    st.tuples(st.just("number"), st.floats(-50, 50) | st.integers(-50, 50) | st.booleans()),
    st.tuples(st.just("constant"), st.floats(-9, 9) | st.integers(-9, 9)),
)
NAMES = ["add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "abs", "round2", "min", "max", "floor", "pow2"]
TREES = st.recursive(LEAF, lambda t: st.tuples(st.sampled_from(NAMES), t, t), max_leaves=12)
STEPS = {
    **{n: getattr(operator, n) for n in ("add", "sub", "mul", "truediv", "floordiv", "mod")},
    "neg": lambda a, b: -a, "abs": lambda a, b: abs(a), "round2": lambda a, b: round(a, 2), "min": min, "max": max,
    "floor": lambda a, b: math.floor(a) if isinstance(a, float) else a, "pow2": lambda a, b: a**2,
}  # fmt: skip


def evaluate(tree, number):
    if tree[0] in ("number", "constant"):
        return number(tree[1]) if tree[0] == "number" else tree[1]
    return STEPS[tree[0]](evaluate(tree[1], number), evaluate(tree[2], number))


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_expression_trees_give_pythons_value_and_type(tree):
    ledger = FakeLedger()
    assert same(outcome(lambda: evaluate(tree, ledger.number)), outcome(lambda: evaluate(tree, lambda v: v)))


@settings(max_examples=400, deadline=None)
@given(st.floats(-1e6, 1e6) | st.integers(-(10**6), 10**6).map(lambda i: i / 1000), st.integers(-3, 8))
def test_round_is_pythons_correct_rounding_at_ties_and_near_ties(x, digits):
    r = round(FakeLedger().number(x), digits)
    assert isinstance(r, Linked) and r.value == round(x, digits) == r.tensor.item()


def test_round_where_the_scaled_float_is_a_false_tie():
    for x in (2.675, 1.005, 0.285, 1.115, 2.5, 0.125, 1e22, 5e-324, 8.5):
        for digits in (0, 1, 2, 3):
            assert round(FakeLedger().number(x), digits).tensor.item() == round(x, digits)


def test_observing_notes_nothing(caplog):
    ledger = FakeLedger()
    v, n = ledger.number(0.5), ledger.number(3)
    f"{v:.3f} {v} {v!r} {n:03d}", f"{v:e}", "%.3f %d %s" % (v, n, v), str(v), repr(v), format(v, "g"), v.hex()  # noqa: UP031
    caplog.set_level(logging.INFO)
    logging.getLogger("mlc-test").info("loss %f at %d", v, n)
    text = "%.2f"
    text %= v
    print(v, n, file=None)
    assert text == "0.50" and "loss 0.500000 at 3" in caplog.text
    assert pickle.loads(pickle.dumps([v, n])) == [0.5, 3]
    assert type(pickle.loads(pickle.dumps(v))) is float
    assert copy.deepcopy({"a": v})["a"] is v is copy.copy(v)
    assert decimal.Decimal(str(v)) == decimal.Decimal("0.5")
    assert ledger.guards == []


def test_arithmetic_keeps_the_link_without_a_guard():
    ledger = FakeLedger()
    v, n = ledger.number(0.5), ledger.number(3)
    average = 0.9 * (v + 1) + 0.1 * v - v / 4 + n * 2 - abs(-v)
    average += v
    total = sum([v, v, n])
    assert isinstance(average, Number) and isinstance(total, Number)
    assert ledger.guards == []


@pytest.mark.parametrize(
    ("use", "outcomes"),
    [
        (lambda v, n: v < 1, [True]), (lambda v, n: v < 1, [True]), (lambda v, n: bool(v), [True]),
        (lambda v, n: v == n, [False]), (lambda v, n: [1, 2, 3, 4][n], [3]), (lambda v, n: float(v), [0.5]),
        (lambda v, n: int(v), [0.5]), (lambda v, n: {v: 1}, [0.5]), (lambda v, n: math.fsum([v]), [0.5]),
        (lambda v, n: np.array([v])[0], [0.5]), (lambda v, n: np.ones(2) * v, [0.5]), (lambda v, n: "ab" * n, [3]),
        (lambda v, n: 1 / v, [True]), (lambda v, n: max(v, 0.1), [False]), (lambda v, n: np.ones(2) % v, [0.5]),
        (lambda v, n: v * datetime.timedelta(4), [0.5]), (lambda v, n: v is None or v == "a" or v == [], []),
        (lambda v, n: v.is_integer(), [False]), (lambda v, n: n**n, [3]), (lambda v, n: 1 << n, [3]),
        (lambda v, n: v * np.float32(2), [0.5]), (lambda v, n: complex(v), [0.5]), (lambda v, n: range(n), [3]),
        (lambda v, n: "%d" % n + str(float(v)), [0.5]), (lambda v, n: n * n, [True]), (lambda v, n: n * 7, []),  # noqa: UP031
    ],
)  # fmt: skip
def test_decisions_and_escapes_are_guarded(use, outcomes):
    ledger = FakeLedger()
    use(ledger.number(0.5), ledger.number(3))
    assert ledger.outcomes() == outcomes


def test_what_raises_is_guarded_by_the_exact_values():
    ledger = FakeLedger()
    v = ledger.number(0.0)
    with pytest.raises(ZeroDivisionError):
        1 / v
    with pytest.raises(OverflowError):
        ledger.number(1e200) ** 2
    with pytest.raises(ValueError, match="NaN"):
        round(ledger.number(math.nan))
    assert ledger.outcomes()[:2] == [0.0, 1e200] and len(ledger.guards) == 3


def test_an_exact_value_is_guarded_once():
    ledger = FakeLedger()
    v = ledger.number(0.5)
    assert float(v) + float(v) == 1.0 and {v}
    assert len(ledger.guards) == 1


def test_it_says_that_it_is_the_plain_type():
    ledger = FakeLedger()
    v, n, b = ledger.number(0.5), ledger.number(3), ledger.number(True)
    assert isinstance(v, float) and isinstance(v, numbers.Real) and not isinstance(v, int)
    assert isinstance(n, int) and isinstance(n, numbers.Integral) and isinstance(b, bool) and np.isscalar(v)
    assert type(v) == float and type(n) in (int, str) and {float: 1, int: 2}[type(n)] == 2  # noqa: E721
    assert type(v)(3) == 3.0 and v.__class__ is float
    assert type(np.float64(v)) is np.float64 and float(np.float64(2) * v) == 1.0
    assert isinstance(fractions.Fraction(1, 2) * v, Number)


def test_a_long_int_is_guarded_instead_of_wrapping_around():
    ledger = FakeLedger()
    n = ledger.number(2**40)
    assert type(n * n) is int and n * n == 2**80
    assert ledger.outcomes() == [2**40]


def test_items_of_any_shape_and_dtype():
    ledger = FakeLedger()
    for t in (torch.tensor([[0.25]]), torch.tensor([2], dtype=torch.int16), torch.tensor(True), torch.tensor([1.5])):
        for dtype in (t.dtype, torch.bfloat16 if t.is_floating_point() else t.dtype):
            n = take(t.to(dtype), ledger)
            assert n.tensor.shape == () and n.value == t.item() and type(n.value) is type(t.item())
    p = torch.tensor([1.0, 2.0])
    n = take(p[1], ledger)
    p.add_(1)
    assert n.tensor.item() == 2.0  # of the moment when it was read


def test_lists_of_numbers_take_their_elements_when_asked():
    ledger = FakeLedger()
    t = torch.arange(6.0).reshape(2, 3)
    rows = numbers_of(t, ledger)
    t.zero_()
    assert [[x.value for x in row] for row in rows] == [[0, 1, 2], [3, 4, 5]]
    assert rows[1][2].tensor.item() == 5 and (rows[1][0] + rows[0][1]).tensor.item() == 4


def test_an_array_that_leaves_is_guarded_whole():
    ledger = FakeLedger()
    t = torch.arange(3.0)
    escape(t, ledger)
    t.zero_()
    assert torch.equal(ledger.guards[0][1], torch.arange(3.0))


def test_after_the_recording_it_is_a_plain_number():
    ledger = FakeLedger()
    v, n = ledger.number(0.5), ledger.number(3)
    ledger.recording = False
    assert type(v * 2) is float and v * 2 == 1.0
    for x in (v, n):
        x.end()
    assert type(v + n) is float and v < n and [1, 2, 3, 4][n] == 4 and f"{v:.1f}" == "0.5" and {v: 1}[0.5] == 1
    assert torch.ones(2).mul(v).tolist() == [0.5, 0.5] and type(max(1, 2 * n)) is int
    assert ledger.guards == []


def test_only_a_text_on_the_left_of_percent_is_formatting():
    ledger = FakeLedger()
    v, n, fmt, name = ledger.number(0.5), ledger.number(3), "%.1f", "loss"

    class Log:
        fmt = "%.2f"

        def line(self, x):
            return self.fmt % x

    texts = ["%d" % n, fmt % v, f"{name} %.1f" % v, b"%d" % n, Log().line(v)]  # noqa: UP031
    texts += ["%s %.1f" % (name, abs(-v)), "%(a).1f" % {"a": v}]  # noqa: UP031
    assert texts == ["3", "0.5", "loss 0.5", b"3", "0.50", "loss 0.5", "0.5"]
    assert not [g for g in ledger.guards if g[2] != "a branch"]
    assert (np.ones(1) % [v])[0] == 0 and ledger.outcomes()[-1] == 0.5
    w = ledger.number(0.25)
    text = (fmt if name else "%s") % w
    assert text == "0.2" and ledger.outcomes()[-1] == 0.25  # not certainly a text: guarded


def test_numpy_makes_arrays_of_the_plain_type():
    ledger = FakeLedger()
    v, n, b = ledger.number(0.5), ledger.number(3), ledger.number(True)
    for got, want in (([v, 1], [0.5, 1]), ([n, 2], [3, 2]), ([b], [True]), ([[v, n]], [[0.5, 3]]), (v, 0.5), (n, 3)):
        for make in (np.array, np.asarray):
            a, w = make(got), make(want)
            assert a.dtype == w.dtype and a.shape == w.shape and (a == w).all()
    assert np.full(2, v).dtype == np.float64 and np.arange(4)[n] == 3
    assert set(ledger.outcomes()) == {0.5, True, 3}
