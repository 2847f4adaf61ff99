"""Values that PyTorch's graph does not have, computed from the recording while the run goes on.

A gradient that goes through a declared inner training (:func:`mlc.level`, :func:`mlc.clone`) is the gradient of the
unrolled training.  The recording up to here is run again under autograd, from the state before the call, on the same
items and random numbers: a plain unroll (Maclaurin et al. 2015), used for the first call only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mlc.ir.builder import dce
from mlc.ir.core import Draw, Eqn, Region, Var
from mlc.ir.program import Input, Program
from mlc.ir.types import TensorType
from mlc.passes.autodiff.policy import Policy
from mlc.passes.levels.flows import find_levels
from mlc.passes.responses.respond import respond
from mlc.trace.gradients.unroll import Unroll
from mlc.trace.recorder.drawing import Drawing

__all__ = ["evaluate"]


def evaluate(observer: Drawing, vs: Sequence[Var]) -> list[Tensor]:
    """The values of ``vs``, which the last ``grad`` equation gave.

    Memory: every step up to here is kept while it runs, as by a plain unroll.
    """
    externals = list(observer.externals.values())
    region = dce(Region(tuple(x.var for x in externals), tuple(observer.builder.eqns), tuple(vs)))
    with observer.pause(), _disable_current_modes(), torch.enable_grad():
        region = _answered(observer, region, externals)
        now = observer.random.states()
        observer.random.put(list(observer.random.start.values()))
        try:
            inputs = [observer.snapshots.before(x.held).detach().clone() for x in externals]
            for x, t in zip(externals, inputs, strict=True):
                if x.tensor.requires_grad:
                    t.requires_grad_()
            found = Replay(observer, region.eqns, externals).run(inputs, tuple(vs))
        finally:
            observer.random.put(now)
    return [_laid_out(observer, x, v) for x, v in zip(found, vs, strict=True)]


def _answered(observer: Drawing, region: Region, externals: Sequence[Any]) -> Region:
    """The recording so far with the responses of its levels."""
    asked = {n: r for n, r in observer.responses.items() if r is not None}
    asked.update({n.partition(" -> ")[0]: r for n, r in observer.flows.items() if isinstance(n, str)})
    if all(r.exact for r in asked.values()):
        return region
    roles = ["meta" if x.tensor.requires_grad and not x.written else "data" for x in externals]
    inputs = [Input(f"in{i}", role, x.var.type) for i, (role, x) in enumerate(zip(roles, externals, strict=True))]
    program = Program("so far", region, tuple(inputs), len(region.outputs))
    levels, flows = find_levels(program, [])
    program = replace(program, levels=levels, flows=flows)
    responses = {x.name: asked[x.declared] for x in levels if x.declared in asked and not asked[x.declared].exact}
    return respond(program, responses, Policy()).region


def _laid_out(observer: Drawing, found: Tensor, v: Var) -> Tensor:
    ty = v.type
    assert isinstance(ty, TensorType)
    with observer.pause(), torch.no_grad():
        return torch.empty_strided(ty.shape, ty.stride, dtype=ty.dtype, device=ty.device).copy_(found)


class Replay(Unroll):
    """An unroll of the recording so far, on the items that were drawn."""

    def __init__(self, observer: Drawing, eqns: tuple[Eqn, ...], externals: Any) -> None:
        super().__init__(eqns, [x.var for x in externals])
        self._observer = observer
        self._drawn: dict[tuple[int, int], int] = {}

    def draw(self, op: Draw) -> list[Tensor]:
        """The item that the run drew here; the generator moves as it then did."""
        key = (op.source, op.visit)
        k = self._drawn[key] = self._drawn.get(key, -1) + 1
        states = self._observer.item_states
        for at in (-1, 0) if k == 0 else (k,):
            if (*key, at) in states:
                torch.set_rng_state(states[(*key, at)])
        return self._observer.items(op.source, op.visit, k)
