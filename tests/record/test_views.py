"""Writing through views: the base, and every other view of it, are what PyTorch's own in-place write makes of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.regions import recorded, run

X = torch.rand(4, 6, 2, dtype=torch.float64)
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(24, 2),
    "a row": lambda x: x[1],
    "a slice": lambda x: x[1:3],
    "a slice with a step": lambda x: x[:, 1:6:2],
    "permuted": lambda x: x.permute(2, 0, 1),
    "transposed": lambda x: x.transpose(0, 2),
    "unsqueezed": lambda x: x.unsqueeze(1),
    "a diagonal": lambda x: x.diagonal(1, 0, 1),
    "a view of a view": lambda x: x[1:].transpose(0, 1)[2],
    "one of several": lambda x: x.unbind(1)[3],
    "one of several pieces": lambda x: x.split(2, 1)[2],
    "one of unequal pieces": lambda x: x.split([1, 3, 2], 1)[1],
    "a chunk": lambda x: x.chunk(3, 1)[1],
    "by strides": lambda x: x.as_strided((3, 2), (13, 5), 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_reaches_the_base_and_its_other_views(name: str) -> None:
    view = VIEWS[name]

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x * 1.0
        other, v = y[:, 2], view(y)
        v.mul_(3.0)
        v += 1
        return y, other * 1.0, v * 1.0

    for a, b in zip(run(recorded(f, X), [X]), f(X), strict=True):
        torch.testing.assert_close(a, b)
