"""Central differences of the plain function along directions: the referee of every gradient.

A value that a loss reads through `detach()` in a line marked `# cut` is a constant of the derivative. For such programs
the cut values of the undisturbed run are recorded and played back while the meta-parameters move; under
`stop_gradient="inner"` such a cut holds for the inner gradient only, and plain differences are the referee.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.fuzz.program import Program, Tensors, value

STEPS = (1e-4, 1e-5, 1e-3, 1e-6, 1e-2)


@dataclass(frozen=True)
class Slope:
    """A directional derivative of the plain function and how far its two best estimates are apart."""

    along: Tensors
    value: float
    spread: float

    def of(self, gradient: Tensors) -> float:
        """The same derivative by a gradient."""
        return sum(float((gradient[n] * d).sum()) for n, d in self.along.items() if n in gradient)

    def wrong(self, gradient: Tensors, scale: float) -> bool:
        """Whether a gradient disagrees; `scale` is the size of the result."""
        allowed = max(2e-6 * abs(self.value), 10 * self.spread, 1e-9 * max(1.0, scale))
        return not abs(self.of(gradient) - self.value) <= allowed


@contextlib.contextmanager
def cuts(path: str, values: list[Tensor], play: bool) -> Iterator[None]:
    """Record (or play back) what `detach()` gives in the lines of a file that are marked `# cut`."""
    plain: Callable[..., Tensor] = Tensor.detach
    queue = iter(list(values))

    def detach(x: Tensor) -> Tensor:
        frame: Any = sys._getframe(1)
        if frame.f_code.co_filename != path or "# cut" not in linecache.getline(path, frame.f_lineno):
            return plain(x)
        if play:
            return plain(next(queue)).clone()
        values.append(plain(x).clone())
        return plain(x)

    with mock.patch.object(Tensor, "detach", detach):
        yield


def directions(metas: Tensors, number: int, seed: int = 5) -> list[Tensors]:
    """Random directions of unit length: in all meta-parameters at once, then in a single one each."""
    gen = torch.Generator().manual_seed(seed)
    every = {n: torch.randn(t.shape, generator=gen, dtype=t.dtype) for n, t in metas.items()}
    groups = [list(every)]
    single: dict[str, list[str]] = {}
    for n in every:
        single.setdefault(n.split(".")[0], []).append(n)
    if len(single) > 1:
        groups += list(single.values())[: number - 1]
    return [unit({n: every[n] for n in names}) for names in groups]


def unit(raw: Tensors) -> Tensors:
    length = torch.stack([r.square().sum() for r in raw.values()]).sum().sqrt()
    return {n: r / length for n, r in raw.items()}


def slopes(program: Program, run: int, frozen: bool, number: int = 3, gradient: Tensors | None = None) -> list[Slope]:
    """Slopes of a run; with `gradient`, step sizes are tried only until one agrees with it."""
    path, kept = str(program.path), []
    if frozen:
        args, metas = program.fresh(run)
        with cuts(path, kept, play=False):
            scale = float(value(program.train(**args)).detach())
    else:
        args, metas = program.fresh(run)
        scale = float(value(program.train(**args)).detach())

    def at(shift: Tensors) -> float:
        args, _ = program.fresh(run, shift)
        with cuts(path, kept, play=True) if frozen else contextlib.nullcontext():
            return float(value(program.train(**args)).detach())

    found = []
    for along in directions(metas, number):
        estimates: list[tuple[float, float]] = []
        for h in STEPS:
            up, down = (at({n: sign * h * d for n, d in along.items()}) for sign in (1, -1))
            estimates.append((h, (up - down) / (2 * h)))
            if len(estimates) < 2:
                continue
            slope = best(along, estimates)
            if (
                gradient is not None
                and slope.spread <= 1e-5 * abs(slope.value) + 1e-9
                and not slope.wrong(gradient, scale)
            ):
                break
        found.append(best(along, estimates))
    return found


def best(along: Tensors, estimates: list[tuple[float, float]]) -> Slope:
    """The two neighbouring step sizes that agree best."""
    ordered = [s for _, s in sorted(estimates)]
    one, two = min(pairwise(ordered), key=lambda pair: abs(pair[0] - pair[1]))
    return Slope(along, (one + two) / 2, abs(one - two))
