"""Every operator of the OpInfo database in the loss of one compiled gradient step, to third order: none wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.opinfo.case import judge, name_of
from tests.opinfo.sweep import operators, reason, table

TABLE = Path(__file__).parents[2] / "docs" / "legality.md"
REFUSED_AT_MOST = 12
FAST = """
add mul div.no_rounding_mode pow sin exp log sqrt tanh sigmoid erf atan2 where clamp lerp polar
cumsum cumprod logcumsumexp logsumexp prod std norm linalg.vector_norm softmax sort topk cat stack
split as_strided index_put index_fill index_add gather scatter_reduce.prod
masked.logaddexp linalg.det linalg.solve linalg.cholesky linalg.eigh linalg.svd linalg.qr fft.fft
fft.hfft nn.functional.conv2d nn.functional.batch_norm nn.functional.layer_norm
nn.functional.group_norm nn.functional.rms_norm nn.functional.embedding nn.functional.grid_sample
nn.functional.scaled_dot_product_attention nn.functional.dropout nn.functional.rrelu
nn.functional.huber_loss nn.functional.max_pool2d nn.functional.interpolate.bicubic
nn.functional.cross_entropy cov
""".split()  # noqa: SIM905


# Operators whose third derivative PyTorch gets wrong, and what they are made of.
THIRD = """
nn.functional.batch_norm nn.functional.layer_norm native_layer_norm native_batch_norm nn.functional.instance_norm
nn.functional.group_norm nn.functional.rms_norm linalg.det linalg.slogdet linalg.solve linalg.inv linalg.eigh
logcumsumexp cumprod prod scatter_reduce.prod masked.logaddexp cholesky_inverse std
linalg.vector_norm nn.functional.scaled_dot_product_attention nn.functional.conv2d
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", FAST)
def test_operator(name: str) -> None:
    v = judge(_operator(name), most=2)
    assert v.verdict == "ok", v


@pytest.mark.parametrize("name", THIRD)
def test_third_derivative(name: str) -> None:
    v = judge(_operator(name), most=1, order=3, variants=1)
    assert v.verdict == "ok", v


@pytest.mark.parametrize("order", [2, 3])
def test_a_wrong_derivative_of_pytorch_is_refused(order: int) -> None:
    """The loop's own inner gradient is wrong there: a right one would be another program."""
    v = judge(_operator("as_strided_scatter"), most=2, order=order, variants=1)
    assert v.verdict == "refused", v
    assert "does not reproduce the run" in v.note


def _operator(name: str) -> Any:
    (op,) = [o for o in operators() if name_of(o) == name]
    return op


@pytest.mark.slow
def test_sweep() -> None:
    """Takes half an hour; writes ``docs/legality.md``."""
    found = [judge(op, most=2, order=order, variants=4, seconds=120) for op in operators() for order in (2, 3)]
    assert not [v for v in found if v.verdict in ("wrong", "raw")]
    refused = {v.op: v for v in found if v.verdict == "refused"}
    assert len(refused) <= REFUSED_AT_MOST, refused
    assert not [v for v in refused.values() if reason(v.note).startswith("unexplained")]
    count = Counter(v.order for v in found if v.verdict == "ok")
    assert count[2] >= 490
    assert count[3] >= 480
    TABLE.write_text(table(found))
