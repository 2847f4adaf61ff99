"""The norm of several values together."""

import torch

from mlc.ir.builder import Builder
from mlc.ir.types import TensorType
from mlc.passes.autodiff.norm import norm, scalar
from mlc.runtime.interpreter.interpreter import compile_region


def test_it_is_that_of_all_elements_in_the_kind_of_the_first() -> None:
    x, y = torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([[4.0], [12.0]])
    b = Builder()
    made = norm(b, [b.input(TensorType.of(x)), b.input(TensorType.of(y))])
    assert made.type == scalar(TensorType.of(x))
    (found,) = compile_region(b.region([made]), lambda e: None)([x, y])
    assert found.item() == 13.0 and found.dtype == torch.float64
