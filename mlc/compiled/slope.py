"""``verify="gradient"``: the first gradient beside a directional difference of the compiled program itself.

The forward program has reproduced the run; its central differences along one random direction of the meta-parameters
therefore say what the gradient must be, without running the user's code again.  Differences see through a cut that the
user wrote, so a program with one on the way from a meta-parameter is not compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlc.compiled.validate import Redrawn
from mlc.errors import VerifyError
from mlc.ir.program import Program
from mlc.runtime.call import Executor, Run
from mlc.trace.observe import Observation
from mlc.trace.recorder.randomness import RandomWatch

__all__ = ["compare_slope"]

_STEPS = {torch.float64: (1e-3, 1e-4, 1e-5, 1e-6), torch.float32: (3e-2, 1e-2, 3e-3)}
_ALLOWED = {torch.float64: 1e-4, torch.float32: 5e-2}


def compare_slope(seen: Observation, program: Program, executor: Executor, own: Sequence[Tensor], run: Run,
                  total: Callable[[float], float] = float) -> None:  # fmt: skip
    """Compare; costs one gradient and up to eight forward runs.

    ``total`` sums over the processes that run the program: each has only its part of both numbers.

    Raises:
        VerifyError: when gradient and differences disagree.
    """
    stages = executor.stages
    dtypes = {own[i].dtype for i in program.metas}
    if not stages.cotangents or len(dtypes) != 1 or dtypes.isdisjoint(_STEPS) or any("cut" in n for n in program.notes):
        return
    (dtype,) = dtypes
    generator = torch.Generator().manual_seed(0)
    along = {i: torch.randn(own[i].shape, generator=generator, dtype=torch.float64).to(own[i]) for i in program.metas}
    seeds = [torch.ones_like(run.results[i]) for i in stages.cotangents]
    found = executor.backward(run, seeds, True)
    parts = zip(stages.gradients, found, strict=True)
    slope = total(sum(float((g * along[i]).sum()) for i, g in parts if g is not None))

    def value(h: float) -> float:
        moved = [t + h * along[i] if i in along else t for i, t in enumerate(own)]
        RandomWatch.put(seen.random[0])
        try:
            results = executor.forward(moved, Redrawn(seen)).results
        finally:
            RandomWatch.put(seen.random[1])
        return total(sum(float(results[i].sum()) for i in stages.cotangents))

    slopes = [(value(h) - value(-h)) / (2 * h) for h in _STEPS[dtype]]
    pairs = [(abs(a - b), (a + b) / 2) for a, b in itertools.pairwise(slopes)]
    spread, measured = min(pairs)
    scale = max(abs(slope), abs(measured), 1e-6)
    if abs(slope - measured) > _ALLOWED[dtype] * scale + 5 * spread:
        raise VerifyError(
            f"the gradient does not agree with differences of the program: {slope:.6g} instead of {measured:.6g} along "
            "one direction; no number of it is given out",
            loc=program.loc,
            advice="this is a fault of mlc (or the loss has a kink here): mlc.check tells which meta-parameter",
        )
