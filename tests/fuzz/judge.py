"""A program judged: the oracles, cheapest first, until one finds a fault."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.fuzz import metamorphic, plans
from tests.fuzz.program import Program, Tensors, loaded, quiet, start, value
from tests.fuzz.refusals import reason
from tests.fuzz.slopes import slopes
from tests.fuzz.spec import Spec
from tests.fuzz.state import Flat, differences, gap, gist, snapshot
from tests.fuzz.verdict import Verdict


class Wrong(Exception):
    """An oracle disagrees: its name, and what differs."""


def eager(program: Program, run: int) -> tuple[Flat, float]:
    """What the plain function leaves, and its value."""
    args, metas = program.fresh(run)
    out = program.train(**args)
    return snapshot(args, out, metas), float(value(out).detach())


def called(program: Program, compiled: Callable[..., Any], run: int) -> tuple[Flat, Tensors]:
    """What the compiled function leaves, and its gradient."""
    args, metas = program.fresh(run)
    out = compiled(**args)
    left = snapshot(args, out, metas)
    got = torch.autograd.grad(value(out), list(metas.values()), allow_unused=True)
    grads = {n: torch.zeros_like(t) if g is None else g.detach() for (n, t), g in zip(metas.items(), got, strict=True)}
    return left, grads


def check_values(program: Program, compiled: Any, runs: int, expected: list[Flat]) -> list[Tensors]:
    """Value, final state and generators, at the first and at later calls with other data."""
    found = []
    for run in range(runs):
        left, grads = called(program, compiled, run)
        wrong = unlike(program, run, left, expected[run])
        if wrong:
            raise Wrong(f"values, call {run + 1}", f"{gist(wrong)}; {len(wrong)} differ: " + "; ".join(wrong[:4]))
        found.append(grads)
    return found


def unlike(program: Program, run: int, left: Flat, expected: Flat) -> list[str]:
    """How what a call left differs, beyond what rounding may do to this program."""
    apart = differences(left, expected)
    return differences(left, expected, loose=rounding(program, run, expected)) if apart else []


def rounding(program: Program, run: int, expected: Flat) -> dict[str, float]:
    """How far each number moves when the model's weights move by their rounding.

    An optimizer that divides a gradient by its own size makes noise of order one of a gradient that is zero in theory.
    """
    moved: dict[str, float] = {}
    for seed in range(3):
        args, metas = program.fresh(run)
        gen = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in args["model"].parameters():
                by = torch.randint(-1, 2, p.shape, generator=gen) * torch.finfo(p.dtype).eps
                p.mul_(1 + by.to(p.dtype))
        left = snapshot(args, program.train(**args), metas)
        for name in expected.keys() & left.keys():
            apart = gap(left[name], expected[name])
            if not isinstance(apart, str):
                moved[name] = max(moved.get(name, 0.0), 10 * apart)
    return moved


def check_slopes(program: Program, run: int, grads: Tensors, frozen: bool, number: int) -> list[str]:
    """The gradient against differences of the plain function; returns notes on vague ones."""
    notes = []
    for slope in slopes(program, run, frozen, number, gradient=grads):
        if slope.spread > 1e-3 * abs(slope.value) + 1e-8:
            notes.append(f"vague: {slope.value:.3e} +- {slope.spread:.0e}")
        if slope.wrong(grads, 1.0):
            names = "+".join(sorted({n.split(".")[0] for n in slope.along}))
            got = slope.of(grads)
            off = abs(got - slope.value) / max(abs(slope.value), 1e-12)
            zero = " (zero)" if got == 0 else ""
            raise Wrong(
                "gradient",
                f"along {names}{zero}; {got:.6e} wanted {slope.value:.6e} +- {slope.spread:.0e}, off by {off:.1e}",
            )
    return notes


def flat(program: Program, names: set[str]) -> bool:
    """Whether the result does not depend on these meta-parameters (on none at all, where none is named)."""
    found = slopes(program, 0, "cut" in program.traits, 20)
    asked = [s for s in found if not names or {n.split(".")[0] for n in s.along} <= names]
    return bool(asked) and all(abs(s.value) < 1e-12 for s in asked)


def judged(spec: Spec, *, folder: Path | None = None, depth: int = 0) -> Verdict:
    """The verdict of a program.

    Args:
        spec: It.
        folder: Where its file is written.
        depth: 0: values and the gradient; 1: also two other plans and the relations between runs; 2: all plans.
    """
    began = time.process_time()
    verdict = Verdict(spec.seed, "ok", spec=spec.dump())
    with quiet():
        try:
            program = loaded(spec, folder)
            expected = [eager(program, run) for run in range(2)]
            assert eager(program, 0)[1] == expected[0][1], "not deterministic"
            assert all(abs(v) < 1e6 for _, v in expected), "the value is no number, or too large"
        except Exception as e:
            verdict.kind, verdict.oracle, verdict.detail = "broken", "eager", f"{type(e).__name__}: {e}"
            return verdict
        attempt(verdict, program, [left for left, _ in expected], depth)
    verdict.seconds = time.process_time() - began
    return verdict


def attempt(verdict: Verdict, program: Program, expected: list[Flat], depth: int) -> None:
    """Run the oracles; what they find goes into the verdict."""
    import mlc

    start(0)
    try:
        compiled = mlc.compile(program.train)
        verdict.oracle = "first call"
        grads = check_values(program, compiled, 2, expected)
        verdict.oracle = "gradient"
        cut = "cut" in program.traits
        for run, number in ((0, 3), (1, 1)):
            verdict.notes += check_slopes(program, run, grads[run], cut, number)
        if depth:
            verdict.oracle = "plans"
            plans.check(program, compiled, expected[0], grads[0], Wrong, every=depth > 1)
            verdict.oracle = "metamorphic"
            metamorphic.check(program, grads[0], Wrong)
        verdict.oracle = ""
        verdict.kind = "vague" if verdict.notes else "ok"
    except Wrong as e:
        verdict.kind, verdict.oracle, verdict.detail = "wrong", e.args[0], e.args[1]
    except mlc.MlcError as e:
        verdict.kind, verdict.detail = "refused", f"{type(e).__name__}: {e.what} | try: {e.advice}"
        verdict.line = e.loc.source() or "" if e.loc is not None else "(no line)"
        verdict.expected = reason(e.what, lambda names: flat(program, names))
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        verdict.kind = "raw"
        place = f"{Path(last.filename).name}:{last.name}"
        verdict.detail = f"{type(e).__name__}: {str(e)[:300]}\nat {place}"
        ours = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == str(program.path)]
        verdict.line = ours[-1].line or "" if ours else ""
