"""Rows of eight bits: what comes back, whatever the layout, and what is never numbers."""

import pytest
import torch
from torch import Tensor

from mlc.ir.core import Region, Var
from mlc.ir.types import TensorType
from mlc.ir.verify import verify
from mlc.passes.precision import rows
from mlc.runtime.interpreter.interpreter import compile_region


def there_and_back(x: Tensor) -> tuple[Tensor, int]:
    """What is read again, and the bytes that were stored."""
    v = Var(TensorType.of(x))
    found = rows.quantised(v, "store")
    assert found is not None
    eqns, q, scale = found
    out = Var(v.type)
    region = Region((v,), (*eqns, *rows.dequantised(q, scale, out, "store")), (out, q, scale))
    verify(region)
    back, codes, scales = compile_region(region, lambda e: None)([x])
    return back, codes.nbytes + scales.nbytes


@pytest.mark.parametrize("shape", [(1024,), (7, 64), (3, 5, 8, 16), (2, 1, 513)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_half_a_scale_of_their_row(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    back, size = there_and_back(x)
    n, width = rows.rows(TensorType.of(x))
    assert width >= rows.ROW and n * width == x.numel() and size == x.numel() + 4 * n
    largest = x.float().reshape(n, width).abs().amax(1, keepdim=True)
    error = (back.float() - x.float()).reshape(n, width).abs()
    slack = 2**-8 if dtype is torch.bfloat16 else 1e-6
    assert back.dtype == dtype and bool((error <= largest / 254 * 1.001 + slack * largest).all())


def test_permuted_layouts_come_back_as_they_were() -> None:
    x = torch.randn(16, 8, 32).permute(2, 0, 1)
    back, _ = there_and_back(x)
    assert back.stride() == x.stride() and float((back - x).abs().max()) < 0.03


def test_a_layout_with_holes_is_left_alone() -> None:
    assert rows.quantised(Var(TensorType.of(torch.zeros(64, 64)[:, ::2])), "store") is None


def test_masked_scores_stay_masked_zero_stays_zero_and_nan_poisons_its_row() -> None:
    x = torch.randn(4, 64)
    x[0, 3:] = -torch.inf
    x[1] = 0
    x[2, 5] = torch.nan
    x[3, 7] = torch.inf
    back, _ = there_and_back(x)
    assert torch.equal(back[0].isneginf(), x[0].isneginf()) and bool((back[0, :3] - x[0, :3]).abs().max() < 0.02)
    assert torch.equal(back[1], x[1]) and bool(back[2].isnan().all()) and bool(back[3].isnan().all())
