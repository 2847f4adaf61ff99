"""One look at many values."""

import math

import torch

from mlc.runtime.interpreter.watching import finite


def test_one_look_at_tensors_of_many_kinds() -> None:
    good = [torch.ones(3), torch.full((2, 2), -1e300, dtype=torch.float64), torch.ones(2).bfloat16(), torch.empty(0)]
    assert finite([*good, torch.arange(3), None, 2.0])
    for bad in (math.nan, math.inf, -math.inf):
        for t in good[:3]:
            x = t.clone()
            x.view(-1)[-1] = bad
            assert not finite([*good, x])
