"""A compiled function whose numbers are always those of the compiled program.

``mlc.compile`` gives out what the first call's real run computed, which differs from the program's numbers by
rounding.  A training that was continued makes first calls where the uninterrupted one made later ones: so here the
real run is put back once the program has reproduced it, and the program runs.  Plans are made once for each program,
and can be taken over from an earlier process: then the same numbers come out bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mlc.compiled.call import Call
from mlc.compiled.compiled import CompiledFunction
from mlc.errors import MlcError
from mlc.trace.observe import Observation
from mlc.training.level import Level
from mlc.view.plan import Plan

__all__ = ["Compiled", "names_of"]


def names_of(levels: Sequence[Level], written: Mapping[Level, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Tensors that steps change, by names that are the same in every process: parameters, optimizer state, buffers."""
    out: dict[str, Tensor] = {}
    for x in levels:
        for i, p in enumerate(x.params):
            out[f"{x.name}/{i}"] = p
            state = x.optimizer.state.get(p, {})
            out.update((f"{x.name}/{i}/{k}", t) for k, t in state.items() if isinstance(t, Tensor))
        out.update((f"{x.name}/written {j}", t) for j, t in enumerate(written[x]))
    return out


class Compiled(CompiledFunction):
    """One block's step, compiled."""

    def _run(self, call: Call, seen: Observation | None = None) -> Any:
        if seen is None or not seen.recording.reusable:
            return super()._run(call, seen)
        particles = self.particles.copy()
        with torch.no_grad():
            super()._run(call, seen)
        seen.undo()
        self.particles = particles
        return super()._run(Call(self, call.entry, call.roots))

    def plans(self) -> dict[str, str]:
        """The plans made so far, as JSON by program."""
        return {key: held.plan.model_dump_json() for key, held in self._planned.items() if not held.smaller}

    def take_over(self, plans: Mapping[str, str]) -> None:
        """Use plans that were made before, where their program comes up again."""
        for key, text in plans.items():
            try:
                plan = Plan.model_validate_json(text)
            except (MlcError, ValueError):
                continue  # of another version of mlc: made anew
            held: Any = SimpleNamespace(plan=plan, smaller=False)
            self._planned.setdefault(key, held)
