"""The same program under other plans: budgets, ways of derivatives and cuts give the same numbers; the IR is sound."""

from __future__ import annotations

from typing import Any

from tests.fuzz.program import Program, Tensors
from tests.fuzz.slopes import slopes

VARIANTS: dict[str, dict[str, Any]] = {
    "min": {"memory": "min"},
    "reverse": {"flows": "reverse"},
    "mixed": {"flows": "mixed"},
    "forward": {"flows": "forward"},
    "inner": {"stop_gradient": "inner"},
    "one slot": {"levers": {"slots": 1}},
}


def check(program: Program, compiled: Any, grads: Tensors, wrong: type[Exception], every: bool) -> None:
    """Compare the gradients of `min` and of one more variant (or of every one) with the first plan's."""
    import mlc
    from mlc.ir.verify import verify_program
    from tests.fuzz.judge import called

    if compiled.program is not None:
        verify_program(compiled.program)
    cut = "cut" in program.traits
    others = list(VARIANTS)[1:]
    names = list(VARIANTS) if every else ["min", others[program.spec.seed // 10 % len(others)]]
    for name in names:
        if name == "forward" and sum(g.numel() for g in grads.values()) > 40:
            continue
        other = mlc.compile(program.train, **VARIANTS[name])
        _, found = called(program, other, 0)
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
