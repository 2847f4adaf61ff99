"""Steps that are not finite: refused with level, step and operator, or skipped with everything as before."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlc

BAD = 3  # the outer step whose data has a NaN in it


def made(nonfinite: Any = "raise", bad: float = math.nan, kind: Any = torch.optim.SGD) -> tuple[mlc.Training, Any]:
    w, u = (nn.Parameter(torch.full((2,), v, dtype=torch.float64)) for v in (0.5, 0.2))

    def batches() -> Iterator[Tensor]:
        for k in range(1, 9):
            x = torch.full((2,), float(k), dtype=torch.float64)
            x[1] = bad if k == 2 * BAD else x[1]  # the second step below of outer step BAD
            yield x

    inner = mlc.Level(
        "inner", w, torch.optim.SGD([w], lr=0.01, momentum=0.9), lambda b: ((w - u) * b).square().mean(), batches, 2
    )
    outer = mlc.Level("outer", u, kind([u], lr=0.1), lambda: (w - 1).square().sum() + u.square().sum().sqrt())
    return mlc.Training([inner, outer], nonfinite=nonfinite), (w, u, inner)


def test_the_level_the_outer_step_and_the_inner_step_are_named() -> None:
    training, (_, u, _) = made()
    with pytest.raises(mlc.NonfiniteError) as e:
        training.run(5)
    assert training.step == BAD - 1
    assert (e.value.level, e.value.steps) == ("inner", (BAD, 2))
    assert f"outer step {BAD}, level 'inner', step 2: NaN was there already, in an item of its data" in str(e.value)
    assert torch.isfinite(u).all()


def test_a_skipped_step_leaves_everything_as_it_was() -> None:
    training, (w, u, inner) = made("skip")
    training.run(BAD - 1)
    before = [w.clone(), u.clone(), inner.optimizer.state[w]["momentum_buffer"].clone()]
    with pytest.warns(mlc.MlcWarning, match=f"step {BAD} is skipped: outer step {BAD}, level 'inner', step 2: NaN"):
        values = training.run(1)
    assert math.isnan(values["inner"])
    after = [w, u, inner.optimizer.state[w]["momentum_buffer"]]
    assert all(map(torch.equal, before, after))
    assert training.step == BAD
    assert inner.feed.position == 2 * BAD
    training.run(2)
    assert math.isfinite(training.run(1)["inner"])


def test_an_infinity_that_no_derivative_reaches() -> None:
    training, _ = made(bad=math.inf)
    with pytest.raises(mlc.NonfiniteError, match=f"outer step {BAD}, level 'inner', step 2"):
        training.run(5)


def test_a_step_of_the_top_that_is_not_finite() -> None:
    training, _ = made()
    training.levels[-1].optimizer.param_groups[0]["lr"] = math.inf
    with pytest.raises(
        mlc.NonfiniteError, match="level 'outer': its gradient is finite, and its parameters are not"
    ) as e:
        training.run(1)
    assert e.value.operator == "SGD.step"


def test_without_the_guard_it_is_pytorchs() -> None:
    training, (w, _, _) = made(None)
    with pytest.warns(mlc.MlcWarning, match="is nan: clip"):
        training.run(BAD)
    assert torch.isnan(w).any()
    with pytest.raises(mlc.PlanError, match="nonfinite=3"):
        made(3)


def test_many_in_a_row_are_an_error() -> None:
    training, (w, _, _) = made("skip")
    with torch.no_grad():
        w.fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlc.MlcWarning)
        with pytest.raises(mlc.NonfiniteError, match="outer step 10"):
            training.run(20)
    assert training.guard.skipped == 10
