"""Translation validation: what was compiled must reproduce what the recorded run computed.

The compiled program runs from the state before the call, on the items that were drawn, with the generators as they
were; its results, final states and generators are compared with the real ones, to the rounding of their type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mlc.errors import CaptureError, MlcError, VerifyError
from mlc.ir.core import Eqn, Grad, Var
from mlc.passes.rules.legality import PYTORCH_WRONG
from mlc.runtime.interpreter.feeds import Drawer
from mlc.trace.capture import Ref
from mlc.trace.gradients.evaluate import Replay
from mlc.trace.observe import Observation
from mlc.trace.python.state import parts

__all__ = ["Redrawn", "compare"]

# Largest difference that summation order explains after many steps, relative to the largest element.
_TOLERANCE = {
    torch.float64: 1e-7,
    torch.float32: 5e-3,
    torch.complex128: 1e-7,
    torch.complex64: 5e-3,
    torch.float16: 0.2,
    torch.bfloat16: 0.5,
}


class Redrawn(Drawer):
    """Gives the items of the recorded run again, and moves the generator as the iterables then did."""

    def __init__(self, seen: Observation) -> None:
        self._states = seen.observer.item_states
        drawn = seen.observer.drawn_items

        def open_source(source: int, visit: int) -> Iterator[Any]:
            return self._again(source, visit, drawn.get((source, visit), []))

        super().__init__(open_source, lambda item: item)  # the tensors as they were drawn, whatever became of the item

    def _again(self, source: int, visit: int, items: Sequence[Any]) -> Iterator[Any]:
        self._move((source, visit, -1))
        for k, item in enumerate(items):
            self._move((source, visit, k))
            yield item
        self._move((source, visit, len(items)))

    def _move(self, key: tuple[int, int, int]) -> None:
        state = self._states.get(key)
        if state is not None:
            torch.set_rng_state(state)


def compare(
    seen: Observation,
    results: Sequence[Any],
    where: Callable[[int], Any],
    again: Callable[[Callable[[Tensor], Tensor]], Sequence[Any]],
    anywhere: Callable[[bool], bool] = bool,
) -> None:
    """Compare the results of the compiled program with those of the recorded run.

    Args:
        seen: The recorded run.
        results: What the program computed.
        where: The user's line that made a result.
        again: Runs the program once more from inputs changed by a function: where results differ it tells how much
            rounding alone can do (a gradient that is zero in theory, divided by its own size, is noise of order one).
        anywhere: Whether something is so on any process that runs the program (they run it again together).

    Raises:
        VerifyError: with the first result that differs and the line that made it.
    """
    if seen.observer.trail is not None:
        print(first_difference(seen))
    noise = _noise(seen)
    pairs = [(i, x, y) for i, (x, y) in enumerate(zip(results, seen.reals, strict=True)) if isinstance(y, Tensor)]
    if anywhere(any(difference(x, y, noise.get(i, 0.0)) is not None for i, x, y in pairs)):
        noise = _sensitivity(results, again, noise)
    for i, (mine, real) in enumerate(zip(results, seen.reals, strict=True)):
        if not isinstance(real, Tensor):
            continue
        err = difference(mine, real, noise.get(i, 0.0))
        if err is not None:
            raise _mismatch(seen, i, err, where(i))
    for i, outcome, what, loc in seen.recording.decisions:
        if not same(results[i], outcome, loose=True):
            raise VerifyError(
                f"the compiled program does not reproduce {what} that the run read here",
                loc=loc,
                advice="this is a fault of mlc: call the function without mlc and report it",
            )


def _mismatch(seen: Observation, i: int, err: str, loc: object) -> MlcError:
    """What to say where the program does not reproduce the run."""
    if seen.observer.recomputed:
        return CaptureError(
            "a checkpointed part reads state that it changes: what backward() recomputes is not what it computed",
            loc=seen.observer.recomputed[0],
            advice="change that state after the checkpointed part, not in it",
        )
    for e in seen.recording.eqns:
        known = PYTORCH_WRONG.get(e.op)
        if known is not None and _order(seen, e) >= known[0]:
            return CaptureError(
                f"PyTorch gets {known[1]} wrong, and a gradient of the loop needs it: the compiled program does not "
                f"reproduce the run (result {i} {err})",
                loc=e.loc,
                advice=known[2],
            )
    return VerifyError(
        f"the compiled program does not reproduce the run: result {i} {err}; no number of it is given out",
        loc=loc,
        advice="this is a fault of mlc: call the function without mlc and report it; verify=None skips the comparison",
    )


def _order(seen: Observation, e: Eqn) -> int:
    """How many gradients, each through the one before, the loop takes through what an equation computes."""
    order: dict[Var, int] = dict.fromkeys(e.outs, 0)
    for later in seen.recording.eqns:
        reached = [order[v] for v in later.inputs if v in order]
        if reached:
            order.update(dict.fromkeys(later.outs, max(reached) + isinstance(later.op, Grad)))
    return max(order.values())


def first_difference(seen: Observation) -> str:
    """The first equation of the recording that does not compute what the run computed (for builders of mlc).

    Needs a run under ``MLC_TRAIL=1``, which keeps every value.
    """
    trail = seen.observer.trail
    assert trail is not None
    externals = seen.recording.externals
    inputs = [seen.initial(x).clone().requires_grad_(x.tensor.requires_grad) for x in externals]
    seen.observer.random.put(seen.random[0])
    eqns = seen.recording.eqns
    wanted = [v for e in eqns for v in e.outs if v in trail]
    found = Replay(seen.observer, tuple(eqns), externals).run(inputs, wanted)
    made = {v: e for e in eqns for v in e.outs}
    for v, t in zip(wanted, found, strict=True):
        if str(made[v].op).startswith("aten.empty"):
            continue  # whatever lay there
        err = difference(t, trail[v])
        if err is not None:
            return f"{made[v].op} at {made[v].loc}: {err}"
    return "the recording reproduces the run: a pass changed it"


def _noise(seen: Observation) -> dict[int, float]:
    """Rounding of states, by result: that of the largest state of the same name.

    What is exactly zero in theory (the gradient of a key's bias, and the moments of an optimizer made of it) is
    rounding noise of sums over numbers as large as its siblings'.
    """
    names: dict[int, Any] = {}
    for e in seen.recording.effects:
        last = e.key[-1] if isinstance(e.key, tuple) and e.key else e.key
        name = (e.kind, type(e.owner), last if isinstance(last, str) else "")
        names.update((x.index, name) for x in parts(e.value) if isinstance(x, Ref))
    largest: dict[Any, float] = {}
    for i, name in names.items():
        real = seen.reals[i]
        if isinstance(real, Tensor) and real.dtype.is_floating_point and real.numel():
            scale = float(real.detach().abs().max())
            if scale < float("inf"):
                largest[name, real.dtype] = max(largest.get((name, real.dtype), 0.0), scale)
    return {
        i: 64 * torch.finfo(real.dtype).eps * largest.get((name, real.dtype), 0.0)
        for i, name in names.items()
        if isinstance(real := seen.reals[i], Tensor) and real.dtype.is_floating_point
    }


def _sensitivity(
    results: Sequence[Any], again: Callable[[Callable[[Tensor], Tensor]], Sequence[Any]], noise: dict[int, float]
) -> dict[int, float]:
    """How far results move, by result, when inputs move by their rounding."""
    generator = torch.Generator().manual_seed(0)

    def nudged(t: Tensor) -> Tensor:
        if not t.dtype.is_floating_point:
            return t
        by = torch.randint(-1, 2, t.shape, generator=generator).to(t.device, t.dtype)
        return t * (1 + by * torch.finfo(t.dtype).eps)

    found = dict(noise)
    for _ in range(_NUDGES):
        for i, (a, b) in enumerate(zip(again(nudged), results, strict=True)):
            if isinstance(a, Tensor) and a.dtype.is_floating_point and a.shape == b.shape and a.numel():
                moved = float(torch.nan_to_num((a - b).abs()).max())
                found[i] = max(found.get(i, 0.0), _MARGIN * moved)
    return found


_NUDGES = 3
_MARGIN = 10.0


def difference(mine: Tensor, real: Tensor, noise: float = 0.0) -> str | None:
    """How two tensors differ beyond rounding (``noise``: of sums that cancel); None when they do not."""
    if mine.shape != real.shape or mine.dtype != real.dtype:
        return f"has type {mine.dtype} {tuple(mine.shape)}, not {real.dtype} {tuple(real.shape)}"
    a, b = mine.detach(), real.detach()
    if not b.numel():
        return None
    tolerance = _TOLERANCE.get(b.dtype)
    if tolerance is None:
        return None if torch.equal(a, b) else "has other values"
    nan_a, nan_b = torch.isnan(a), torch.isnan(b)
    if not torch.equal(nan_a, nan_b):
        return "is not a number in other places"
    a, b = torch.where(nan_a, 0, a), torch.where(nan_b, 0, b)
    same_infinite = torch.isinf(b) & (a == b)
    a, b = torch.where(same_infinite, 0, a), torch.where(same_infinite, 0, b)
    scale = float(torch.where(torch.isinf(b), 0, b).abs().max())  # an infinity is no size that others are small beside
    err = float((a - b).abs().max())
    bound = tolerance * max(scale, torch.finfo(b.dtype).tiny ** 0.5 if b.dtype.is_floating_point else 1e-30)
    return None if err <= max(bound, noise) else f"differs by {err:.3g} where the largest element is {scale:.3g}"


def same(found: Any, outcome: Any, *, loose: bool = False) -> bool:
    """Whether a program found again what the recorded run decided on."""
    if isinstance(outcome, Tensor):
        if loose:
            return difference(found, outcome.detach()) is None
        return bool(torch.equal(found.detach(), outcome))
    value = found.item()
    if value == outcome or (value != value and outcome != outcome):
        return True
    if not loose or isinstance(outcome, (bool, int)):
        return False
    return bool(abs(value - outcome) <= _TOLERANCE.get(found.dtype, 0.0) * max(abs(outcome), 1e-12))
