"""Relations between runs that hold whatever the numbers: identities inserted, training in two parts, compiling anew."""

from __future__ import annotations

from typing import Any

from tests.fuzz.data import DATA
from tests.fuzz.program import Program, Tensors, loaded
from tests.fuzz.state import differences, gist, snapshot


def check(program: Program, grads: Tensors, wrong: type[Exception]) -> None:
    """All relations that the program allows."""
    identity(program, grads, wrong)
    parts(program, wrong)


def identity(program: Program, grads: Tensors, wrong: type[Exception]) -> None:
    """`x * 1`, a view and a clone in the step, compiled anew: the same gradient."""
    import mlc
    from tests.fuzz.judge import called
    from tests.fuzz.plans import compare

    other = loaded(program.spec.but(identity=True), program.path.parent)
    _, found = called(other, mlc.compile(other.train), 0)
    compare(found, grads, "identity inserted", wrong)


def halves(args: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The same arguments with the first part of the data, then with the rest."""
    middle = (steps + 1) // 2
    return [{**args, "data": part} for part in (args["data"][:middle], args["data"][middle:])]


def parts(program: Program, wrong: type[Exception]) -> None:
    """T = a + b: two calls in sequence, on one state, leave what the plain function leaves; lengths may differ."""
    import mlc

    spec = program.spec
    if "list" not in DATA[spec.data].traits or spec.steps < 2 or spec.place != "outside" or spec.loop == "nexted":
        return
    if spec.loop in ("cycled", "zipped", "epochs_next", "epochs_break"):
        return
    left = []
    compiled = mlc.compile(program.train)
    for function in (program.train, compiled):
        args, metas = program.fresh(0)
        outs = [function(**part) for part in halves(args, spec.steps)]
        left.append(snapshot(args, outs, metas))
    found = differences(left[1], left[0])
    if found:
        raise wrong("two calls in sequence", f"{gist(found)}; {len(found)} differ: " + "; ".join(found[:4]))
