"""Rules of losses and of row-wise operators: what keeps examples apart is split right, what does not is refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlc.ir.core import Region
from mlc.passes.microbatch.dependence import MIXED
from mlc.passes.microbatch.independence import Analysis, batchwise
from mlc.passes.microbatch.split import microbatch
from tests.passes.regions import recorded, run

N = 8
X, W = torch.rand(N, 5, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
T, Y = torch.rand(N, 4, dtype=torch.float64), torch.tensor([0, 3, 2, 2, 1, -100, 3, 0])
C = torch.rand(4, dtype=torch.float64) + 0.5

LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "squares, mean": lambda x, w, t, y: F.mse_loss(x @ w, t),
    "squares, sum": lambda x, w, t, y: F.mse_loss(x @ w, t, reduction="sum"),
    "squares, each": lambda x, w, t, y: F.mse_loss(x @ w, t, reduction="none").sum(1),
    "huber": lambda x, w, t, y: F.huber_loss(x @ w, t, delta=0.3),
    "likelihood, mean": lambda x, w, t, y: F.cross_entropy(x @ w, y),
    "likelihood, weighted": lambda x, w, t, y: F.cross_entropy(x @ w, y, weight=t[0] + 0.5),
    "likelihood, sum": lambda x, w, t, y: F.cross_entropy(x @ w, y, reduction="sum"),
    "likelihood, each": lambda x, w, t, y: F.cross_entropy(x @ w, y, reduction="none"),
    "a mean": lambda x, w, t, y: ((x @ w) * t).mean(),
    "a mean of means": lambda x, w, t, y: (x @ w).tanh().mean(1).mean(),
    "rows": lambda x, w, t, y: ((x @ w).softmax(1) * t).sum(),
}


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_parts_give_what_the_batch_gives(name: str, k: int) -> None:
    region = recorded(LOSSES[name], X, W, T, Y)
    split = microbatch(region, k)
    assert isinstance(split, Region), split
    for a, b in zip(run(split, [X, W, T, Y]), run(region, [X, W, T, Y]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_product_of_sums_over_examples_is_no_sum() -> None:
    region = recorded(lambda x, w: ((h := x @ w).t() @ h) @ (h.t() @ h), X, W)
    found = batchwise(region, data=[region.inputs[0]])
    assert isinstance(found, Analysis) and found.kinds[region.outputs[0]] is MIXED


@pytest.mark.parametrize("over", ["softmax", "cumsum", "sort"])
def test_along_the_batch_examples_meet(over: str) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        return h.sort(0)[0] if over == "sort" else getattr(h, over)(0)

    region = recorded(f, X, W)
    found = batchwise(region, data=[region.inputs[0]])
    assert not isinstance(found, Analysis) or found.kinds[region.outputs[0]] is MIXED
