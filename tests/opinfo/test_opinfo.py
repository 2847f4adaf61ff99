"""Every operator of the OpInfo database as the loss of one compiled gradient step: none wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.opinfo.case import judge, name_of
from tests.opinfo.sweep import operators, table

TABLE = Path(__file__).parents[2] / "docs" / "legality.md"
REFUSED_AT_MOST = 25
FAST = """
add mul div.no_rounding_mode pow sin exp log sqrt tanh sigmoid erf atan2 where clamp lerp polar
cumsum cumprod logcumsumexp logsumexp prod std norm linalg.vector_norm softmax sort topk cat stack
split as_strided as_strided_scatter index_put index_fill index_add gather scatter_reduce.prod
masked.logaddexp linalg.det linalg.solve linalg.cholesky linalg.eigh linalg.svd linalg.qr fft.fft
fft.hfft nn.functional.conv2d nn.functional.batch_norm nn.functional.layer_norm
nn.functional.group_norm nn.functional.rms_norm nn.functional.embedding nn.functional.grid_sample
nn.functional.scaled_dot_product_attention nn.functional.dropout nn.functional.rrelu
nn.functional.huber_loss nn.functional.max_pool2d nn.functional.interpolate.bicubic
nn.functional.cross_entropy cov
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", FAST)
def test_operator(name: str) -> None:
    (op,) = [o for o in operators() if name_of(o) == name]
    v = judge(op, most=2)
    assert v.verdict == "ok", v


@pytest.mark.slow
def test_sweep() -> None:
    """Takes some minutes; writes ``docs/legality.md``."""
    found = [judge(op, most=3) for op in operators()]
    assert not [v for v in found if v.verdict in ("wrong", "raw")]
    count = Counter(v.verdict for v in found)
    assert count["refused"] <= REFUSED_AT_MOST, [v for v in found if v.verdict == "refused"]
    assert count["ok"] >= 490
    TABLE.write_text(table(found))
