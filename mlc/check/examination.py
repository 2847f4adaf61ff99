"""One check: the compiled gradient of a call beside differences of the function and beside the plain unroll."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.check.function import Failure, Function
from mlc.check.limitations import customs, cutting, precision, through_updates
from mlc.check.recorded import Began, Frozen, Recorded, Start, Watched
from mlc.check.report import CheckReport, Difference, MetaError, Tolerances, best_pair, relative, worst
from mlc.check.sandbox import Sandbox
from mlc.compiled.together import in_one_process
from mlc.errors import DifferentiationError, MlcError
from mlc.ir.core import Random
from mlc.trace.capture import Recording, Ref

__all__ = ["Examination", "UsersError", "weights_of"]

DIRECTIONS = 2
MOST_METAS = 16
Direction: TypeAlias = list[Tensor]


class UsersError(Exception):
    """What the user's function raises by its own code: it goes through as it is."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _refuse(failure: Failure, dtype: torch.dtype) -> None:
    """Say so when the function does not run because types do not mix in float64."""
    if failure.mixed and dtype is torch.float64:
        raise MlcError(
            f"the function does not run in float64: {failure}",
            loc=failure.loc,
            advice="pass dtype=torch.float32: the loop makes float32 values that do not mix",
        ) from failure.error


class Examination:
    """One check."""

    def __init__(self, box: Sandbox, fn: Any, args: Any, kwargs: object, options: dict[str, Any]) -> None:
        self.box = box
        self.notes: list[str] = []
        self.stop = options.get("stop_gradient", "all")
        self.plain = Function(box, fn, args, kwargs)
        if self.plain.failure is not None:
            _refuse(self.plain.failure, box.dtype)
        cf = Watched(fn, options)
        outs = self._called(cf, args, kwargs)
        program = cf.program
        assert program is not None and cf.start is not None
        in_one_process(program)
        self.rec: Recording = program.binding
        self.start: Start = cf.start
        titles = {x.name: x.title for x in program.levels}
        asked = cf.plan.modes.responses if cf.plan is not None else {}
        off = cf.plan.modes.off if cf.plan is not None else ()
        self.approximate = (
            *(f"{r} of level {titles[name]}" for name, r in asked.items()), *(f"path {p} switched off" for p in off),
        )  # fmt: skip
        self.picks = list(program.metas)
        self.names = [program.inputs[i].name for i in self.picks]
        self.metas = [self.rec.externals[i].tensor for i in self.picks]
        vars_ = [self.rec.externals[i].var for i in self.picks]
        self.places = [k for k, x in enumerate(self.rec.out_leaves) if isinstance(x, Ref) and not x.number]
        self.values = [outs[k].detach().clone() for k in self.places]
        self.weights = weights_of([outs[k] for k in self.places])
        self.state, self.generator = self.plain.now(), torch.get_rng_state()
        self.ours = self._gradient([outs[k] for k in self.places])
        base = Recorded(self.rec, self.start, self.stop)
        self.cut = [c for c in cutting(self.rec, vars_) if not base.owns(c)]
        self.customs = customs(self.rec, vars_)
        self.tolerances = Tolerances.of(precision(self.rec, vars_))
        self.frozen: Frozen | None = None
        self.runs = self.plain.failure is None
        if self.runs and any(isinstance(e.op, Random) and e.inputs for e in self.rec.eqns):
            self.plain.keep_draws()
        inside = [n for n, t in zip(self.names, self.metas, strict=True) if not box.holds(t)]
        self.moves = not inside  # whether the function can be run with moved meta-parameters
        if inside:
            self.notes.append(f"{', '.join(inside[:3])} is made in the call: only the recording can be moved")
        self.wrong: list[str] = []

    def _called(self, cf: Watched, args: Any, kwargs: Any) -> list[Any]:
        """What the compiled function returns."""
        self.box.reset()
        failure = self.plain.failure
        try:
            return pytree.tree_leaves(cf(*args, **kwargs))
        except MlcError:
            raise
        except Exception as e:
            if failure is not None and type(failure.error) is type(e):
                if not failure.torchs:
                    raise UsersError(e) from None
                raise MlcError(
                    f"the function fails when it runs by itself: {failure}",
                    loc=failure.loc,
                    advice="make it run in plain PyTorch first",
                ) from e
            raise

    def _gradient(self, outs: list[Tensor]) -> list[Tensor]:
        """The compiled gradient of the result."""
        loss = self._loss(outs)
        if not self.metas or not loss.requires_grad:
            raise DifferentiationError(
                "nothing to check: the result depends on no tensor that requires grad",
                loc=self.rec.loc,
                advice="give a meta-parameter requires_grad=True, and return a tensor",
            )
        found = torch.autograd.grad(loss, self.metas, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, self.metas, strict=True)]

    def report(self) -> CheckReport:
        """Everything compared."""
        value_err, state_err = self._against_function()
        reference, forward = self._unrolled()
        if forward is not None and (not self.runs or not value_err <= self.tolerances.exact):
            value_err = max(value_err, forward)
        self._finite(value_err, reference)
        if self.approximate:
            return self._distance(value_err, state_err, reference)
        differences = [self._difference(f"direction {i + 1}", self._direction(i)) for i in range(DIRECTIONS)]
        if not all(d.ok for d in differences) and len(self.metas) > 1:
            shown = sorted(range(len(self.metas)), key=lambda i: -float(self.ours[i].norm()))[:MOST_METAS]
            differences += [self._difference(self.names[i], self._direction(i, i)) for i in sorted(shown)]
        if self.runs and self.moves and self.cut:
            differences += [self._faithful(f"direction {i + 1}", self._direction(i)) for i in range(DIRECTIONS)]
        errors = self._errors(reference)
        self.plain.last()
        for title in self.customs:
            self.notes.append(
                f"the backward of {title} is taken as it is; differences see its forward, so they only inform"
            )
        for c in self.cut:
            if c.loc is not None:
                self.notes.append(f"a path from a meta-parameter is cut at {c.loc}")
        return CheckReport(
            function=self.rec.function,
            metas=tuple(errors),
            differences=tuple(differences),
            value_err=value_err,
            state_err=state_err,
            unrolled=reference is not None,
            referee=self._referee(),
            tolerances=self.tolerances,
            notes=tuple(dict.fromkeys(self.notes)),
            wrong=tuple(self.wrong),
            against="the eager function" if self.runs else "the plain unroll",
        )

    def _distance(self, value_err: float, state_err: float, reference: list[Tensor] | None) -> CheckReport:
        """Of an approximate gradient from the exact one."""
        cosine = distance = None
        if reference is not None:
            mine, exact = (torch.cat([g.detach().reshape(-1).to(torch.float64) for g in gs]) for gs in
                           (self.ours, reference))  # fmt: skip
            distance = relative(mine, exact)
            size = float(mine.norm() * exact.norm())
            cosine = float(mine @ exact) / size if size else 0.0
        return CheckReport(
            function=self.rec.function, metas=tuple(self._distances(reference)), differences=(), value_err=value_err,
            state_err=state_err, unrolled=reference is not None, referee=self._referee(), tolerances=self.tolerances,
            notes=tuple(dict.fromkeys(self.notes)), wrong=tuple(self.wrong),
            against="the eager function" if self.runs else "the plain unroll",
            responses=self.approximate, cosine=cosine, distance=distance,
        )  # fmt: skip

    def _distances(self, reference: list[Tensor] | None) -> list[MetaError]:
        if reference is None:
            return [MetaError(n, float(g.norm()), None) for n, g in zip(self.names, self.ours, strict=True)]
        rows = zip(self.names, self.ours, reference, strict=True)
        return [MetaError(n, float(r.norm()), relative(g, r)) for n, g, r in rows]

    def _referee(self) -> str:
        if self.cut:
            return "the recording with stopped values frozen"
        return "the function itself" if self.runs and self.moves else "the recording"

    # ---- the function itself

    def _loss(self, outs: Sequence[Tensor]) -> Tensor:
        """One number of all outputs: a fixed combination (the output itself when there is one scalar)."""
        terms = [
            (w * o).sum() if bool(finite.all()) else (w * o)[finite].sum()
            for w, o, v in zip(self.weights, outs, self.values, strict=True)
            if w is not None and bool((finite := v.isfinite()).any())
        ]
        if not terms:
            terms = [(w * o).sum() for w, o in zip(self.weights, outs, strict=True) if w is not None]
        return functools.reduce(torch.add, terms) if terms else torch.zeros(())

    def _against_function(self) -> tuple[float, float]:
        """Errors of the values and of the final states against an eager run of the user's function."""
        failure = self.plain.failure
        if failure is not None:
            self.notes.append(f"the function fails when it runs by itself, at {failure.loc}: {failure}")
            return 0.0, 0.0
        outs = [self.plain.leaves[k] for k in self.places]
        value = worst([relative(a, b) for a, b in zip(self.values, outs, strict=True)])
        if not value <= self.tolerances.exact and self.start.declared and through_updates(self.rec):
            self.runs = False
            self.notes.append(
                "values are those of the plain unroll, not of the eager function: the loop differentiates "
                "through an inner training that mlc.level or mlc.clone declares, a path that plain PyTorch drops"
            )
            return 0.0, 0.0
        errors = [0.0]
        for path, theirs in self.plain.state.items():
            mine = self.state.get(path)
            errors.append(0.0 if mine is None else relative(mine, theirs))
            if not errors[-1] <= self.tolerances.exact:
                self.notes.append(f"{'.'.join(map(str, path))} does not end as the function leaves it")
        if not torch.equal(self.generator, self.plain.generator):
            self.notes.append("the random generator does not end as the function leaves it")
            errors.append(float("inf"))
        return value, worst(errors)

    # ---- the plain unroll

    def _inputs(self, direction: Direction | None = None, h: float = 0.0) -> list[Tensor]:
        """Tensors from outside as leaves, the meta-parameters moved."""
        found = [t.clone() for t in self.start.inputs]
        for i, d in zip(self.picks, direction or (), strict=False):
            found[i].add_(d, alpha=h)
        return [t.requires_grad_(needs) for t, needs in zip(found, self.start.needs, strict=True)]

    def _picked(self, results: Sequence[Tensor]) -> list[Tensor]:
        return [results[self.rec.out_leaves[k].index] for k in self.places]

    def _pulled(self, unroll: Recorded) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradient of an unroll."""
        inputs = self._inputs()
        leaves = [inputs[i] for i in self.picks]
        outs = self._picked(unroll.results(inputs))
        found = torch.autograd.grad(self._loss(outs), leaves, allow_unused=True)
        return outs, [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]

    def _unrolled(self) -> tuple[list[Tensor] | None, float | None]:
        """Gradient of the plain unroll and the error of its values; None where PyTorch has no unroll."""
        try:
            outs, found = self._pulled(Recorded(self.rec, self.start, self.stop))
        except (RuntimeError, NotImplementedError) as e:
            self.notes.append(f"no plain unroll, PyTorch cannot differentiate it twice: {str(e).splitlines()[0]}")
            return None, None
        return found, worst([relative(a, b.detach()) for a, b in zip(self.values, outs, strict=True)])

    def _errors(self, reference: list[Tensor] | None) -> list[MetaError]:
        """Every meta-parameter against the unroll, and whether differences overrule that."""
        if reference is None:
            return [MetaError(n, float(g.norm()), None) for n, g in zip(self.names, self.ours, strict=True)]
        # A gradient that is zero up to round-off is compared on the scale of the largest one.
        floor = 1e-6 * max((float(r.norm()) for r in reference if r.isfinite().all()), default=0.0)
        out = []
        for i, (n, g, r) in enumerate(zip(self.names, self.ours, reference, strict=True)):
            error = relative(g, r, floor)
            overruled = not error <= self.tolerances.exact and self._overruled(i, r)
            if overruled:
                off = f"{error:.1e} off" if math.isfinite(error) else "not finite"
                self.notes.append(
                    f"the plain unroll's gradient of {n} is {off}, by a formula of PyTorch's: "
                    "differences confirm the compiled one"
                )
            out.append(MetaError(n, float(r.norm()), error, overruled))
        return out

    def _overruled(self, i: int, reference: Tensor) -> bool:
        """Whether differences confirm the compiled gradient, and not the unroll's, where these two are most apart."""
        ours = self.ours[i]
        apart = ours - reference
        direction = self._direction(i, i)
        if apart.isfinite().all() and not apart.is_complex():
            direction[i] = apart * (_scale(self.start.inputs[self.picks[i]]) / apart.square().mean().sqrt())
        found = self._difference(self.names[i], direction)
        theirs = float((reference * direction[i]).sum())
        mine, other = abs(found.measured - found.predicted), abs(found.measured - theirs)
        far = 10 * max(mine, found.spread * found.scale)
        return found.conclusive and found.ok and not found.informs and not other <= far

    # ---- what is no number

    def _finite(self, value_err: float, reference: list[Tensor] | None) -> None:
        """NaN and infinity are right only where the function itself gives the same; where they began."""
        odd = [n for n, g in zip(self.names, self.ours, strict=True) if not g.isfinite().all()]
        values = any(not v.isfinite().all() for v in self.values)
        if not odd and not values:
            return
        began = Began(self.rec, self.start, self.stop)
        with contextlib.suppress(RuntimeError, NotImplementedError):  # no unroll: what was found before stands
            self._pulled(began)
        if values:
            whose = (
                "the function itself returns" if self.runs and value_err <= self.tolerances.exact else "the result has"
            )
            self.notes.append(f"{whose} a value that is not finite; it began at {began.value}")
        if odd and all(not v.isfinite().all() for v in self.values) and value_err <= self.tolerances.exact:
            return
        for n in odd:
            self.wrong.append(n)
            where = (
                f"began at {began.gradient or began.value}"
                if reference is None or began.gradient
                else ("the plain unroll's is finite")
            )
            self.notes.append(f"the gradient of {n} is not finite; {where}")

    # ---- differences

    def _direction(self, seed: int, only: int | None = None) -> Direction:
        """Random, of the size of the meta-parameters; ``only``: of one of them."""
        generator = torch.Generator().manual_seed(seed)
        start = [self.start.inputs[i] for i in self.picks]
        return [
            torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) * _scale(t)
            if only is None or only == i
            else torch.zeros_like(t)
            for i, t in enumerate(start)
        ]

    def _moved(self, direction: Direction, h: float) -> Tensor:
        """The plain function's result with the meta-parameters moved."""

        def move() -> None:
            with torch.no_grad():
                for t, d in zip(self.metas, direction, strict=True):
                    t.data.add_(d, alpha=h)

        leaves = self.plain.run(move)
        return self._loss([leaves[k] for k in self.places])

    def _replayed(self, direction: Direction, h: float, stops: bool) -> Tensor:
        """The same of the recording; draws are those of the base point, stopped values too if asked for."""
        if self.frozen is None:
            base = Recorded(self.rec, self.start, self.stop)
            base.results(self._inputs())
            self.frozen = base.kept()
        frozen = self.frozen if stops else Frozen({}, self.frozen.draws)
        run = Recorded(self.rec, self.start, self.stop, frozen)
        return self._loss([t.detach() for t in self._picked(run.results(self._inputs(direction, h)))])

    def _difference(self, title: str, direction: Direction) -> Difference:
        """Derivative along one direction, beside central differences at several step sizes."""

        def at(h: float) -> float:
            plain = self.runs and self.moves and not self.cut
            return float(self._moved(direction, h) if plain else self._replayed(direction, h, True))

        predicted = float(sum((g * d).sum() for g, d in zip(self.ours, direction, strict=True)))
        size = sum(float((g * d).square().sum()) for g, d in zip(self.ours, direction, strict=True)) ** 0.5
        value = abs(float(self._loss(self.values)))
        measured, spread = best_pair([(at(h) - at(-h)) / (2 * h) for h in self.tolerances.steps])
        parts = (size, abs(predicted), abs(measured) * 1e-3, 1e-7 * value, 1e-300)
        scale = max(x for x in parts if math.isfinite(x))
        return Difference(title, predicted, measured, abs(measured - predicted) / scale, spread / scale,
                          self.tolerances.differences, bool(self.customs), scale=scale)  # fmt: skip

    def _faithful(self, title: str, direction: Direction) -> Difference:
        """Where the recording is the referee: with nothing frozen, it moves as the function does."""
        both = []
        for h in self.tolerances.steps[1:4]:  # a branch that is taken otherwise spoils a large step
            theirs = float(self._moved(direction, h) - self._moved(direction, -h)) / (2 * h)
            mine = float(self._replayed(direction, h, False) - self._replayed(direction, -h, False)) / (2 * h)
            both.append((abs(mine - theirs), mine, theirs, h))
        _, mine, theirs, h = min(both)
        value = abs(float(self._loss(self.values)))
        noise = 1e3 * torch.finfo(torch.float64 if self.tolerances.exact <= 1e-7 else torch.float32).eps * value / h
        scale = max(abs(theirs), abs(mine), 1e-300)
        return Difference(f"{title}, nothing frozen", mine, theirs, abs(mine - theirs) / scale, noise / scale,
                          self.tolerances.differences, scale=scale, what="recording")  # fmt: skip


def weights_of(outs: Sequence[Tensor]) -> list[Tensor | None]:
    """With what outputs are combined into one number: fixed random numbers, 1 for a single scalar."""
    generator = torch.Generator().manual_seed(0)
    live = [o for o in outs if o.requires_grad]
    if len(live) == 1 and live[0].dim() == 0:
        return [torch.ones_like(o.detach()) if o.requires_grad else None for o in outs]
    return [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.detach()) if o.requires_grad else None
        for o in outs
    ]


def _scale(t: Tensor) -> float:
    """Size of a typical entry, 1 where all are 0: a step is a fraction of it."""
    rms = float(t.detach().to(torch.float64).square().mean().sqrt()) if t.numel() else 0.0
    return rms if rms > 0 else 1.0
