"""The same program under other plans: budgets, ways of derivatives and cuts give the same numbers; the IR is sound.

The recording of the first judgement serves again, planned anew: only `stop_gradient` makes another program of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.fuzz.program import Program, Tensors
from tests.fuzz.slopes import slopes
from tests.fuzz.state import Flat, gist

VARIANTS: dict[str, dict[str, Any]] = {
    "min": {"memory": "min"},
    "reverse": {"flows": "reverse"},
    "mixed": {"flows": "mixed"},
    "forward": {"flows": "forward"},
    "inner": {"stop_gradient": "inner"},
    "one slot": {"levers": {"slots": 1}},
}
FEW = 2  # plans that a program is asked for unless all are; over many programs each comes equally often
COLUMNS = 40  # elements of meta-parameters up to which forward derivatives are asked for


def chosen(seed: int, every: bool, size: int) -> list[str]:
    """The plans whose turn it is."""
    names = [n for n in VARIANTS if n != "forward" or size <= COLUMNS]
    first = seed // 10 * FEW
    return names if every else [names[(first + i) % len(names)] for i in range(FEW)]


def replanned(program: Program, compiled: Any, options: dict[str, Any]) -> Any:
    """A compiled function with other options, that uses what another one recorded wherever its guards hold."""
    import mlc
    from mlc.compiled.entry import executor_of
    from mlc.passes.planning.options import planning
    from mlc.trace.build import build_program
    from mlc.view.plan import make_plan

    other = mlc.compile(program.train, **options)
    for entry in compiled._entries:
        ir = entry.program
        if "stop_gradient" in options:
            ir = build_program(entry.recording, options["stop_gradient"])
        plan = make_plan(ir, **planning(other.options))
        other._entries.append(replace(entry, program=ir, plan=plan, executor=executor_of(ir, plan), stale=0))
    return other


def check(program: Program, compiled: Any, expected: Flat, grads: Tensors, wrong: type[Exception], every: bool) -> None:
    """What a call leaves, and its gradient, under other plans: two in turn, or every one."""
    from mlc.ir.verify import verify_program
    from tests.fuzz.judge import called, unlike

    if compiled.program is not None:
        verify_program(compiled.program)
    cut = "cut" in program.traits
    for name in chosen(program.spec.seed, every, sum(g.numel() for g in grads.values())):
        left, found = called(program, replanned(program, compiled, VARIANTS[name]), 0)
        apart = unlike(program, 0, left, expected)
        if apart:
            raise wrong(f"plan {name}", f"{gist(apart)}; {len(apart)} differ: " + "; ".join(apart[:4]))
        if name == "inner" and cut:
            for slope in slopes(program, 0, frozen=False, gradient=found):
                if slope.wrong(found, 1.0):
                    raise wrong("plan inner", f"along a cut; {slope.of(found):.6e} wanted {slope.value:.6e}")
            continue
        compare(found, grads, f"plan {name}", wrong)


def compare(found: Tensors, grads: Tensors, oracle: str, wrong: type[Exception], allowed: float = 1e-8) -> None:
    """Two gradients that must be equal to rounding."""
    scale = max(float(g.abs().max()) for g in grads.values())
    for n, g in grads.items():
        apart = float((found[n] - g).abs().max())
        if not apart <= allowed * max(scale, 1e-6):
            raise wrong(oracle, f"gradient of {n.split('.')[0]} off by {apart:.1e} of {scale:.1e}")
