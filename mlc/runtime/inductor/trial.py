"""Trial: whether what a compiled segment gives is what the interpreter gives, on the values at hand.

Two ways of computing the same differ by rounding.  How much is too much depends on the dtype and on how many terms a
sum has; where terms cancel no bound holds.  So in doubt the segment is computed once more in float64, and on inputs
that are off by a few units in the last place: the compiled form may be off by a few times what rounding does to the
interpreter itself (a mixed forward-backward error test; Higham, Accuracy and Stability of Numerical Algorithms, 1.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlc.ir.core import Region
from mlc.ir.types import TensorType
from mlc.runtime.inductor.artefacts import evaluate

__all__ = ["difference", "exercised"]

ULPS = 32.0  # of the size of a result, for a sum of one term
TIMES = 4.0  # how much further off than the interpreter
NUDGE, NUDGES = 8.0, 3  # units in the last place by which inputs are moved, and how often


def difference(body: Region, inputs: Sequence[Tensor], expected: Sequence[Tensor], got: Sequence[Tensor]) -> str | None:
    """What is wrong with the results of a compiled segment; None when they hold.

    Args:
        body: The segment.
        inputs: The values that it was run on.
        expected: What the interpreter gives.
        got: What the compiled segment gives.
    """
    if len(got) != len(expected):
        return f"{len(got)} results instead of {len(expected)}"
    terms = longest_sum(body)
    doubtful = []
    for k, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
            return f"result {k} is {b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                return f"result {k} differs"
        elif not _close(a, b, terms):
            doubtful.append(k)
    return _judged(body, inputs, expected, got, doubtful) if doubtful else None


def exercised(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    """Whether a run said something: a kernel that is wrong may still be right on zeros."""
    return all(map(_speaks, results)) or all(map(_speaks, inputs))


def _speaks(x: Tensor) -> bool:
    return not x.dtype.is_floating_point or x.numel() == 0 or bool((x != 0).any())


def longest_sum(body: Region) -> int:
    """Most terms that one number of the segment is a sum of."""
    longest = 1
    for e in body.eqns:
        sizes = [v.type.numel for v in e.inputs if isinstance(v.type, TensorType)]
        outs = [v.type.numel for v in e.outs if isinstance(v.type, TensorType)]
        if sizes and outs and min(outs) > 0:
            longest = max(longest, max(sizes) // min(outs))
        if "softmax" in str(e.op) and e.outs:
            longest = max(longest, *(s for v in e.inputs if isinstance(v.type, TensorType) for s in v.type.shape), 1)
    return longest


def _close(a: Tensor, b: Tensor, terms: int) -> bool:
    if torch.equal(a, b):
        return True
    allowed = ULPS * torch.finfo(a.dtype).eps * math.sqrt(terms)
    x, y = a.double(), b.double()
    size = x[x.isfinite()].square().mean().sqrt().nan_to_num().item()
    return torch.allclose(y, x, rtol=allowed, atol=allowed * size, equal_nan=True)


def _judged(body: Region, inputs: Sequence[Tensor], expected: Sequence[Tensor], got: Sequence[Tensor],
            doubtful: Sequence[int]) -> str | None:  # fmt: skip
    """The doubtful results against float64 and against what rounding of the inputs does."""
    try:
        exact = evaluate(body, [x.double() if x.dtype.is_floating_point else x for x in inputs])
    except RuntimeError:  # the segment names its dtypes
        exact = list(expected)
    generator = torch.Generator().manual_seed(0)
    nudged = [evaluate(body, [_nudged(x, generator) for x in inputs]) for _ in range(NUDGES)]
    for k in doubtful:
        ref, a, b, *moved = (t.double() for t in (exact[k], expected[k], got[k], *(n[k] for n in nudged)))
        fine = a.isfinite()
        if not torch.equal(fine, b.isfinite()) or not torch.equal(a[~fine].nan_to_num(), b[~fine].nan_to_num()):
            return f"result {k} has other infinite values"
        fine &= ref.isfinite()
        floor = ULPS * torch.finfo(expected[k].dtype).eps
        for norm in (2.0, math.inf):
            off, own, size, *shifts = (_norm(t[fine], norm) for t in (b - ref, a - ref, ref, *(m - a for m in moved)))
            if not off <= TIMES * max(own, *(s for s in shifts if math.isfinite(s)), 0.0) + floor * size:
                return f"result {k} is off by {off / max(size, 1e-300):.1e} of its size"
    return None


def _nudged(x: Tensor, generator: torch.Generator) -> Tensor:
    """The values, each off by a few units in its last place."""
    if not x.dtype.is_floating_point:
        return x
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return (x.double() * (1 + NUDGE * torch.finfo(x.dtype).eps * noise.to(x.device))).to(x.dtype)


def _norm(x: Tensor, p: float) -> float:
    return float(torch.linalg.vector_norm(x, p)) if x.numel() else 0.0
