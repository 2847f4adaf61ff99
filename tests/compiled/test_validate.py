"""When two results count as the same: rounding passes, anything a reader would call wrong does not."""

import pytest
import torch

from mlc.compiled.validate import difference, same

X = torch.rand(100, dtype=torch.float64) + 0.5


@pytest.mark.parametrize(("dtype", "rounding", "wrong"), [(torch.float64, 1e-9, 1e-5), (torch.float32, 1e-4, 0.02)])
def test_rounding_passes_and_errors_do_not(dtype: torch.dtype, rounding: float, wrong: float) -> None:
    x = X.to(dtype)
    assert difference(x * (1 + rounding), x) is None
    found = difference(x * (1 + wrong), x)
    assert found is not None and "differs by" in found


def test_one_element_is_enough() -> None:
    y = X.clone()
    y[7] += 1e-4
    assert difference(y, X) is not None
    assert difference(y, X, noise=1e-3) is None


def test_shape_and_dtype_count() -> None:
    assert "has type" in str(difference(X[:99], X))
    assert "has type" in str(difference(X.float(), X))
    assert difference(X[:0], X[:0]) is None


def test_what_is_no_number_must_be_so_in_the_same_places() -> None:
    nan, inf = X.clone(), X.clone()
    nan[3], inf[3] = float("nan"), float("inf")
    assert difference(nan, nan) is None and difference(inf, inf) is None
    assert difference(nan, X) is not None and difference(X, nan) is not None
    zero = X.clone()
    zero[3] = 0
    assert difference(nan, zero) is not None and difference(zero, nan) is not None
    assert difference(inf, X) is not None and difference(inf, -inf) is not None


def test_integers_are_exact() -> None:
    n = torch.arange(5)
    assert difference(n, n) is None and difference(n, n + (n == 4)) == "has other values"


def test_decisions_are_exact_unless_a_program_is_compared() -> None:
    assert same(X, X) and not same(X * (1 + 1e-12), X) and same(X * (1 + 1e-12), X, loose=True)
    one = torch.tensor(1.0, dtype=torch.float64)
    assert same(one, 1.0) and not same(one, 1.0 + 1e-9) and same(one, 1.0 + 1e-9, loose=True)
    assert not same(one, 2.0, loose=True) and same(one * float("nan"), float("nan"))
    assert not same(torch.tensor(3), 4, loose=True)
