"""``mlc.smoothness``: does the hypergradient predict what a finite step of the meta-parameters does?

A hypergradient is exact for infinitely small changes.  Whether it says anything about the change that an outer step
makes is another question, and the first one to ask of a gradient through training: Engstrom et al. 2025 ("Optimizing
ML training with metagradient descent") call training "metasmooth" where it does, and choose architectures and
hyperparameters for it; Metz et al. 2021 ("Gradients are not all you need") show where it does not.  Here the predicted
change, gradient times step, stands beside real changes of the user's own function: along the negative gradient and
along random directions, at sizes up to the step in question, with the same random numbers and data at each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.check.function import Function
from mlc.check.limitations import cutting
from mlc.check.report import relative
from mlc.check.sandbox import Sandbox
from mlc.check.surroundings import placed, scaled, surroundings
from mlc.compiled.compiled import CompiledFunction
from mlc.compiled.together import in_one_process
from mlc.compiled.underlying import underlying
from mlc.errors import DifferentiationError, MlcError, PlanError
from mlc.ir.core import Random
from mlc.shown import Shown
from mlc.trace.capture import Ref

__all__ = ["Point", "Smoothness", "smoothness"]

DOWN = "negative gradient"
_FRACTIONS = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Point:
    """One step that was tried.

    Attributes:
        direction: ``"negative gradient"``, ``"random 1"``, ...
        step: Its size, in the unit of the ``step`` that was asked for.
        predicted: Change of the result that the gradient predicts.
        measured: Change of the result.
        error: Their distance, relative to the predicted change (along random directions to the one that is typical of
            them, |g| |d| / sqrt(n), where that is larger).
    """

    direction: str
    step: float
    predicted: float
    measured: float
    error: float


@dataclass(frozen=True)
class Smoothness(Shown):
    """How far the hypergradient can be followed.

    Attributes:
        function: Name of the user's function.
        step: The step that was asked for: a factor of the gradient.
        value: The result at the meta-parameters as they are.
        norm: Of the gradient.
        elements: Of all meta-parameters together.
        tolerance: Largest relative error at which a prediction counts as right.
        points: Every step that was tried.
        notes: What a reader should know.
    """

    function: str
    step: float
    value: float
    norm: float
    elements: int
    tolerance: float
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> float:
        """The largest step up to which every prediction was right; 0 where already the smallest one was not."""
        good = 0.0
        for size in sorted({p.step for p in self.points}):
            if not all(p.error <= self.tolerance for p in self.points if p.step == size):
                break
            good = size
        return good

    @property
    def ok(self) -> bool:
        """Whether the gradient predicts what the step asked for does."""
        return self.holds >= self.step

    @property
    def improves(self) -> bool:
        """Whether the result really falls by the step along the negative gradient."""
        return any(p.direction == DOWN and p.step == self.step and p.measured < 0 for p in self.points)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "holds": self.holds, "ok": self.ok, "improves": self.improves}

    def __str__(self) -> str:
        within = f"within {100 * self.tolerance:.3g}%"
        if self.ok:
            verdict = f"the gradient predicts steps up to {self.step:.3g} {within}"
        elif self.holds:
            verdict = f"the gradient predicts steps up to {self.holds:.3g} {within}, not {self.step:.3g}"
        else:
            verdict = f"the gradient predicts no step tried, from {min(p.step for p in self.points):.3g} on, {within}"
        lines = [
            f"smoothness of {self.function}: {verdict}",
            f"  value {self.value:.6g}, gradient norm {self.norm:.3g} over {self.elements} elements; the step along "
            f"the negative gradient {'lowers' if self.improves else 'does not lower'} the result",
            f"  {'direction':<18} {'step':>10} {'predicted':>12} {'measured':>12} {'error':>9}",
        ]
        lines += [
            f"  {p.direction:<18} {p.step:>10.3g} {p.predicted:>12.4g} {p.measured:>12.4g} {100 * p.error:>8.3g}%"
            + ("" if p.error <= self.tolerance else "  off")
            for p in self.points
        ]
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])


def smoothness(fn: Callable[..., Any], *args: object, step: float, directions: int = 2, tolerance: float = 0.25,
               dtype: torch.dtype = torch.float64, **kwargs: object) -> Smoothness:  # fmt: skip
    """Compare what the hypergradient predicts with what finite steps of the meta-parameters really do.

    With g the gradient and d a direction of its length, the meta-parameters are moved by ``s * d`` for s = 1/8, 1/4,
    1/2 and 1 times ``step``, for d = -g and random ones, and the function, as it is in eager PyTorch, runs for each:
    1 + 4 (1 + directions) runs beside one compiled call.  Everything runs on copies, as in :func:`mlc.check`: nothing
    of the user's changes, and every run draws the same random numbers and the same data.

    Args:
        fn: A training loop, compiled or not, that returns one scalar loss (and what carries no derivative).
        *args: Its arguments.
        step: The step to be taken, as a factor of the gradient: the learning rate of plain gradient descent on the
            meta-parameters.  A step that moves them by a distance r is ``r / |g|``.
        directions: How many random directions (of the length of the gradient) are tried beside it.
        tolerance: Largest relative error at which a prediction counts as right.
        dtype: float64, so that rounding does not hide small changes; float32 to leave every type as it is.
        **kwargs: Its keyword arguments.

    Returns:
        The comparison; ``.ok``, ``.holds`` (the largest step up to which predictions are right) and ``.improves`` are
        the verdict, ``str()`` tells it.

    Raises:
        PlanError: for a step, a number of directions, a tolerance or a dtype that makes no sense.
        DifferentiationError: when there is no gradient, or it is zero or not finite.
        MlcError: when the function cannot be compiled, or its meta-parameters cannot be moved from outside.
        Exception: what the function's own code raises.
    """
    _refuse(step, directions, tolerance, dtype)
    fn, args, options = underlying(fn, args)
    options = {**options, "mesh": None}
    box = Sandbox(dtype)
    with surroundings(dtype):
        try:
            inside = box.enter(fn)
            args, kwargs = box.enter(args), box.enter(kwargs)
            box.ready()
            return _Trial(box, inside, args, kwargs, scaled(options, dtype)).steps(step, directions, tolerance)
        except MlcError as e:
            placed(e, fn)
            raise
        finally:
            box.restore()


def _refuse(step: float, directions: int, tolerance: float, dtype: torch.dtype) -> None:
    if not (isinstance(step, (int, float)) and math.isfinite(step) and step > 0):
        raise PlanError(f"step={step!r}", advice="give the learning rate of the outer step, a number above 0")
    if not (isinstance(directions, int) and directions >= 0):
        raise PlanError(f"directions={directions!r}", advice="give a number of random directions, 0 or more")
    if not (isinstance(tolerance, (int, float)) and tolerance > 0):
        raise PlanError(f"tolerance={tolerance!r}", advice="give a relative error, 0.25 for example")
    if dtype not in (torch.float32, torch.float64):
        raise PlanError(f"mlc.smoothness in {dtype}", advice="use torch.float64 or torch.float32")


class _Trial:
    """A call with its gradient, ready to be run with moved meta-parameters."""

    def __init__(self, box: Sandbox, fn: Any, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        self.box = box
        self.plain = Function(box, fn, args, kwargs)
        if self.plain.failure is not None:
            raise self.plain.failure.error
        self.compiled = CompiledFunction(fn, options)
        self.call: Callable[[], Any] = functools.partial(self.compiled, *args, **kwargs)
        box.reset()
        leaves = pytree.tree_leaves(self.call())
        program, plan = self.compiled.program, self.compiled.plan
        assert program is not None and plan is not None
        in_one_process(program)
        self.rec = program.binding
        self.metas = [self.rec.externals[i].tensor for i in program.metas]
        self.loc = program.loc
        self.place = self._result(leaves)
        self.names = [program.inputs[i].name for i in program.metas]
        self.gradient = self._gradient(leaves[self.place])
        if any(isinstance(e.op, Random) and e.inputs for e in self.rec.eqns):
            self.plain.keep_draws()
        self.value = float(self.plain.leaves[self.place].detach())
        self.notes: list[str] = []
        self.eager = relative(leaves[self.place].detach(), self.plain.leaves[self.place]) <= 1e-4
        if not self.eager:
            self.value = float(leaves[self.place].detach())
            self.notes.append(
                "runs are those of the compiled function: a gradient of the loop goes through a declared level, which "
                "plain PyTorch drops"
            )
        self._tell(plan)

    def _result(self, leaves: Sequence[Any]) -> int:
        """Where the loss stands among what the function returns."""
        places = [
            k for k, x in enumerate(self.rec.out_leaves)
            if isinstance(x, Ref) and not x.number and leaves[k].requires_grad
        ]  # fmt: skip
        if not places or not self.metas:
            raise DifferentiationError(
                "the result depends on no tensor that requires grad", loc=self.loc,
                advice="give a meta-parameter requires_grad=True, and return a loss",
            )  # fmt: skip
        if len(places) > 1 or leaves[places[0]].numel() != 1:
            raise DifferentiationError(
                "the function returns more than one number that can be differentiated: which one is the loss?",
                loc=self.loc, advice="return one scalar; detach() what else is returned",
            )  # fmt: skip
        return places[0]

    def _gradient(self, loss: Tensor) -> list[Tensor]:
        inside = [n for n, t in zip(self.names, self.metas, strict=True) if not self.box.holds(t)]
        if inside:
            raise MlcError(
                f"{', '.join(inside[:3])} is made in the call: no step can be taken on it", loc=self.loc,
                advice="make it outside and pass it in",
            )  # fmt: skip
        found = torch.autograd.grad(loss.sum(), self.metas, allow_unused=True)
        g = [torch.zeros_like(t) if x is None else x for x, t in zip(found, self.metas, strict=True)]
        norm = _norm(g)
        if not norm or not math.isfinite(norm):
            what = "is zero: it predicts no change" if norm == 0 else "is not finite"
            raise DifferentiationError(f"the gradient {what}", loc=self.loc, advice="see mlc.check(fn, ...)")
        return g

    def _tell(self, plan: Any) -> None:
        titles = {x.name: x.title for x in self.compiled.program.levels}  # type: ignore[union-attr]
        self.notes += [f"the gradient is that of {r} of level {titles[n]}" for n, r in plan.modes.responses.items()]
        self.notes += [f"the gradient is that without the path {p}" for p in plan.modes.off]
        variables = [self.rec.externals[i].var for i in self.compiled.program.metas]  # type: ignore[union-attr]
        cuts = dict.fromkeys(str(e.loc) for e in cutting(self.rec, variables) if e.loc is not None)
        self.notes += [f"real changes see through the cut at {loc}, the gradient does not" for loc in cuts]

    def steps(self, step: float, directions: int, tolerance: float) -> Smoothness:
        """Try them all."""
        norm, n = _norm(self.gradient), sum(t.numel() for t in self.metas)
        tried = [(DOWN, [-g for g in self.gradient])]
        tried += [(f"random {k + 1}", self._random(k, norm)) for k in range(directions)]
        points = []
        for name, d in tried:
            slope = float(sum((g * x).sum() for g, x in zip(self.gradient, d, strict=True)))
            scale = max(abs(slope), norm * norm / math.sqrt(n))
            points += [self._point(name, d, f * step, slope, scale) for f in _FRACTIONS]
        self.plain.last()
        return Smoothness(self.rec.function, step, self.value, norm, n, tolerance, tuple(points), tuple(self.notes))

    def _random(self, seed: int, norm: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        d = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in self.metas]
        scale = norm / _norm(d)
        return [x * scale for x in d]

    def _point(self, name: str, d: Sequence[Tensor], size: float, slope: float, scale: float) -> Point:
        """One step; what rounding alone may change counts as no error."""
        measured = self._moved(d, size) - self.value
        noise = 1e2 * torch.finfo(torch.float64 if self.box.dtype is torch.float64 else torch.float32).eps
        apart = max(abs(measured - size * slope) - noise * abs(self.value), 0.0)
        error = apart / (size * scale) if math.isfinite(measured) else math.inf
        return Point(name, size, size * slope, measured, error)

    def _moved(self, d: Sequence[Tensor], size: float) -> float:
        def move() -> None:
            with torch.no_grad():
                for t, x in zip(self.metas, d, strict=True):
                    t.data.add_(x, alpha=size)

        if self.eager:
            return float(self.plain.run(move)[self.place])
        self.box.reset()
        move()
        with torch.no_grad():
            return float(pytree.tree_leaves(self.call())[self.place])


def _norm(ts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().abs().double().square().sum()) for t in ts))
