"""``mlc.check``: is the hypergradient right?  Two referees that share little with the compiler.

1. The *plain unroll* (:mod:`mlc.check.unroll`): the recording, run eagerly under PyTorch's own autograd.
2. *Finite differences* of the user's own Python function, run eagerly, along random directions.  A
   difference cannot see a ``detach``, so when one cuts a path from a meta-parameter to the result, the
   recording is perturbed instead, with the stopped values frozen.

Everything runs on float64 copies (:mod:`mlc.check.sandbox`); nothing of the user's changes, random generators
included.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from mlc.api import plain
from mlc.check.limitations import customs, cutting, precision, through_updates
from mlc.check.recorded import Recorded
from mlc.check.report import CheckReport, Difference, MetaError, Tolerances, best_pair, relative
from mlc.check.sandbox import Sandbox, convert
from mlc.compiled.compiled import CompiledFunction
from mlc.errors import MlcError, PlanError
from mlc.passes.options import parse_memory
from mlc.trace.capture import Recording, Ref
from mlc.trace.inputs import walk

__all__ = ["CheckReport", "check"]

DIRECTIONS = 2
MOST_METAS = 16


def check(fn: Callable[..., Any], *args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any) -> CheckReport:
    """Compare the compiled hypergradient of a call with the plain unroll and with finite differences.

    The function runs about 25 times, on copies: parameters, optimizers, buffers and random generators stay
    as they are.  A Python generator given as argument is used up, as by a call.

    Args:
        fn: A training loop, compiled or not (then it is compiled with default options).
        *args: Its arguments.
        dtype: float64 to check in double precision (casts written in the loop stay); float32 to leave every
            type as it is, with tolerances to match.
        **kwargs: Its keyword arguments.

    Returns:
        The report; ``report.ok`` is the verdict, ``str(report)`` names the meta-parameters that disagree.

    Raises:
        MlcError: when the function cannot be compiled, or cannot run in ``dtype``.
    """
    if dtype not in (torch.float32, torch.float64):
        raise PlanError(f"mlc.check in {dtype}", advice="use torch.float64 or torch.float32")
    fn, args, options = plain(fn, args)
    box = Sandbox(dtype)
    with _surroundings(dtype):
        try:
            fn = box.enter(fn)
            args, kwargs = box.enter(args), box.enter(kwargs)
            box.ready()
            return _Examination(box, fn, args, kwargs, _scaled(options, dtype)).report()
        except Exception as e:
            if dtype is torch.float64 and "dtype" in str(e):
                raise MlcError(
                    f"the function does not run in float64: {str(e).splitlines()[0]}",
                    advice="pass dtype=torch.float32: the loop makes float32 values that do not mix",
                ) from e
            raise
        finally:
            box.restore()


def _scaled(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same options; a budget grows with the size of a number, so that the same decisions are checked."""
    memory = parse_memory(options.get("memory"))
    if isinstance(memory, int) and dtype is torch.float64:
        return {**options, "memory": 2 * memory}
    return options


@contextlib.contextmanager
def _surroundings(dtype: torch.dtype) -> Iterator[None]:
    """Default dtype, silence, no compilation of the user's modules, loaders that give ``dtype``."""
    default, iterate = torch.get_default_dtype(), DataLoader.__iter__
    stance = getattr(torch.compiler, "set_stance", None)
    silence = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        stack.callback(setattr, DataLoader, "__iter__", iterate)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(contextlib.redirect_stdout(silence))
        stack.enter_context(contextlib.redirect_stderr(silence))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if stance is not None:
            stack.enter_context(stance("force_eager"))
        if dtype is torch.float64:
            torch.set_default_dtype(dtype)
            DataLoader.__iter__ = lambda self: map(lambda x: convert(x, dtype), iterate(self))  # type: ignore
        yield


@contextlib.contextmanager
def _graphs_kept() -> Iterator[None]:
    """Inner gradients keep their graphs, as mlc does: every step may use a value made before the loop."""
    engine: Any = torch.autograd
    original = engine._engine_run_backward

    def run(outputs: Any, grads: Any, keep_graph: Any = False, *args: Any, **kwargs: Any) -> Any:
        return original(outputs, grads, True, *args, **kwargs)

    engine._engine_run_backward = run
    try:
        yield
    finally:
        engine._engine_run_backward = original


class _Examination:
    """One check."""

    def __init__(self, box: Sandbox, fn: Any, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        self.box, self.fn, self.args, self.kwargs = box, fn, args, kwargs
        self.notes: list[str] = []
        self.runs = True
        self.stop = options.get("stop_gradient", "all")
        cf = CompiledFunction(fn, options)
        box.reset()
        outs = pytree.tree_leaves(cf(*args, **kwargs))
        program = cf.program
        assert program is not None
        self.rec: Recording = program.binding
        self.names = [program.inputs[i].name for i in program.metas]
        self.metas = [self.rec.externals[i].tensor for i in program.metas]
        self.vars = [self.rec.externals[i].var for i in program.metas]
        self.places = [k for k, x in enumerate(self.rec.out_leaves) if isinstance(x, Ref) and not x.number]
        self.weights = _weights([outs[k] for k in self.places])
        self.values = [outs[k].detach().clone() for k in self.places]
        self.state = self._state()
        self.generator = torch.get_rng_state()
        found = torch.autograd.grad(self._loss([outs[k] for k in self.places]), self.metas, allow_unused=True)
        self.ours = [torch.zeros_like(t) if g is None else g for g, t in zip(found, self.metas, strict=True)]
        self.cut = cutting(self.rec, self.vars)
        self.customs = customs(self.rec, self.vars)
        self.tolerances = Tolerances.of(precision(self.rec, self.vars))

    def report(self) -> CheckReport:
        """Everything compared."""
        value_err, state_err = self._against_function()
        frozen = bool(self.cut) or not self.runs
        reference, forward = self._unrolled()
        if forward is not None:
            value_err = max(value_err, forward)
        errors = self._errors(reference)
        referee = "the recording with stopped values frozen" if frozen else "the function itself"
        differences = [self._difference(f"direction {i + 1}", None, i) for i in range(DIRECTIONS)]
        if not all(d.ok for d in differences) and len(self.metas) > 1:
            shown = sorted(range(len(self.metas)), key=lambda i: -float(self.ours[i].norm()))[:MOST_METAS]
            differences += [self._difference(self.names[i], i, i) for i in sorted(shown)]
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
            referee=referee,
            tolerances=self.tolerances,
            notes=tuple(dict.fromkeys(self.notes)),
        )

    # ---- the function itself

    def _loss(self, outs: Sequence[Tensor]) -> Tensor:
        """One number of all outputs: a fixed combination (the output itself when there is one scalar)."""
        terms = [(w * o).sum() for w, o in zip(self.weights, outs, strict=True) if w is not None]
        return functools.reduce(torch.add, terms)

    def _eager(self, move: Callable[[], None] | None = None) -> list[Tensor]:
        self.box.reset()
        if move is not None:
            move()
        with _graphs_kept():
            leaves = pytree.tree_leaves(self.fn(*self.args, **self.kwargs))
        return [leaves[k].detach().clone() for k in self.places]

    def _state(self) -> dict[Any, Tensor]:
        """Final values of everything reachable (not ``.grad``: meta-parameters deliberately differ there)."""
        at = walk(self.fn, self.args, self.kwargs).at
        return {p: t.detach().clone() for p, t in at.items() if p[-1] != ".grad" and t.layout is torch.strided}

    def _against_function(self) -> tuple[float, float]:
        """Errors of the values and of the final states against an eager run of the user's function."""
        try:
            outs = self._eager()
        except Exception as e:
            self.runs = False
            self.notes.append(
                f"the function fails when it runs by itself: {type(e).__name__}: {str(e).splitlines()[0]}"
            )
            return 0.0, 0.0
        state = self._state()
        value = max((relative(a, b) for a, b in zip(self.values, outs, strict=True)), default=0.0)
        if not value <= self.tolerances.exact and through_updates(self.rec):
            self.runs = False
            self.notes.append(
                "values are those of the plain unroll, not of the eager function: the loop differentiates "
                "through an inner update, a path that plain PyTorch drops"
            )
            return 0.0, 0.0
        worst = 0.0
        for path, theirs in state.items():
            mine = self.state.get(path)
            err = 0.0 if mine is None else relative(mine, theirs)
            if not err <= self.tolerances.exact:
                self.notes.append(f"{'.'.join(map(str, path))} does not end as the function leaves it")
            worst = err if not err <= worst else worst
        if not torch.equal(self.generator, torch.get_rng_state()):
            self.notes.append("the random generator does not end as the function leaves it")
            worst = float("inf")
        return value, worst

    # ---- the plain unroll

    def _inputs(self) -> list[Tensor]:
        """Inputs of the recording as leaves."""
        self.box.reset()
        return [e.tensor.detach().clone().requires_grad_(e.tensor.requires_grad) for e in self.rec.externals]

    def _picked(self, results: Sequence[Tensor]) -> list[Tensor]:
        return [results[self.rec.out_leaves[k].index] for k in self.places]

    def _unrolled(self) -> tuple[list[Tensor] | None, float | None]:
        """Gradient of the plain unroll and the error of its values; None where PyTorch has no unroll."""
        inputs = self._inputs()
        at = {e.var: i for i, e in enumerate(self.rec.externals)}
        leaves = [inputs[at[v]] for v in self.vars]
        try:
            unroll = Recorded(self.rec, self.stop)
            outs = self._picked(unroll.run(inputs, self.rec.results))
            loss = self._loss(outs)
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        except (RuntimeError, NotImplementedError) as e:
            self.notes.append(f"no plain unroll, PyTorch cannot differentiate it twice: {str(e).splitlines()[0]}")
            return None, None
        err = max((relative(a, b.detach()) for a, b in zip(self.values, outs, strict=True)), default=0.0)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)], err

    def _errors(self, reference: list[Tensor] | None) -> list[MetaError]:
        if reference is None:
            return [MetaError(n, float(g.norm()), None) for n, g in zip(self.names, self.ours, strict=True)]
        # A gradient that is zero up to round-off is compared on the scale of the largest one.
        floor = 1e-6 * max(float(r.norm()) for r in reference)
        return [
            MetaError(n, float(r.norm()), relative(g, r, floor))
            for n, g, r in zip(self.names, self.ours, reference, strict=True)
        ]

    # ---- differences

    def _frozen(self) -> Callable[[Callable[[], None] | None], list[Tensor]]:
        """The recording as a function of the meta-parameters, stopped values fixed."""
        base = Recorded(self.rec, self.stop)
        base.run(self._inputs(), self.rec.results)
        values = dict(base.stopped)

        def run(move: Callable[[], None] | None) -> list[Tensor]:
            self.box.reset()
            if move is not None:
                move()
            inputs = [e.tensor.detach().clone().requires_grad_(e.tensor.requires_grad) for e in self.rec.externals]
            return [t.detach() for t in self._picked(Recorded(self.rec, self.stop, values).run(inputs, self.rec.results))]

        return run

    def _difference(self, title: str, only: int | None, seed: int) -> Difference:
        """Derivative along one random direction, beside central differences at several step sizes."""
        generator = torch.Generator().manual_seed(seed)
        direction = [
            torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) * _scale(t)
            if only is None or only == i else torch.zeros_like(t)
            for i, t in enumerate(self.metas)
        ]  # fmt: skip
        evaluate = self._frozen() if self.cut or not self.runs else self._eager

        def at(h: float) -> float:
            def move() -> None:
                with torch.no_grad():
                    for t, d in zip(self.metas, direction, strict=True):
                        t.data.add_(d, alpha=h)

            return float(self._loss(evaluate(move)))

        predicted = float(sum((g * d).sum() for g, d in zip(self.ours, direction, strict=True)))
        size = sum(float((g * d).square().sum()) for g, d in zip(self.ours, direction, strict=True)) ** 0.5
        value = abs(float(self._loss(self.values)))
        slopes = [(at(h) - at(-h)) / (2 * h) for h in self.tolerances.steps]
        measured, spread = best_pair(slopes)
        scale = max(size, abs(predicted), abs(measured) * 1e-3, 1e-7 * value, 1e-300)
        return Difference(title, predicted, measured, abs(measured - predicted) / scale, spread / scale,
                          self.tolerances.differences, bool(self.customs))  # fmt: skip


def _weights(outs: Sequence[Tensor]) -> list[Tensor | None]:
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
