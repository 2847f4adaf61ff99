"""Which way derivatives go: what the user asked for with ``flows``, and what became of it.

Three modes.  *mixed*: reverse through the loops, an inner gradient by one forward sweep over it.  *reverse*: the
same, an inner gradient in reverse over reverse.  *forward*: one tangent for each element of the meta-parameters goes
through the loops together with the values, so that memory does not grow with the number of trips and time grows
with the number of elements.  All are exact; an operator that cannot go forward makes the mode fall back to mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc.errors import PlanError
from mlc.ir.lowered.contract import Modes
from mlc.ir.lowered.responses import Response
from mlc.ir.program import Program

__all__ = ["MODES", "check_flows", "resolve"]

MODES = ("mixed", "reverse", "forward")
_USE = (
    'use "mixed", "reverse" or "forward", or a dict from names of levels or meta-parameters to these, or of levels to '
    'responses such as mlc.Implicit("cg")'
)


def check_flows(flows: Any) -> None:
    """Refuse what is no mode and no dict of modes.

    Raises:
        PlanError: naming what is wrong.
    """
    if flows is None or (isinstance(flows, str) and flows in MODES):
        return
    if not isinstance(flows, Mapping):
        raise PlanError(f"flows={flows!r}", advice=_USE)
    for name, mode in flows.items():
        if not isinstance(mode, Response) and mode not in MODES:
            given = f"{mode.__name__} without ()" if isinstance(mode, type) else repr(mode)
            raise PlanError(
                f"flows[{name!r}]={given}",
                advice='a mode is "mixed", "reverse" or "forward", a response mlc.Implicit("cg"), for example',
            )


def resolve(program: Program, flows: Any) -> Modes | None:
    """What ``flows`` asks of a program; None when it asks for nothing.

    Args:
        program: The program.
        flows: A mode for everything, or a dict of modes by name of a level (``"L1"``: how its gradient is
            differentiated; reverse takes the levels below along), of a meta-parameter, or of a flow (``"lr -> L1"``).
            As all meta-parameters share one sweep through the loops, ``"forward"`` for one of them or for a level
            means forward for the program.

    Raises:
        PlanError: for a name that is not there, listing those that are, and for ``"forward"`` beside ``"reverse"``.
    """
    check_flows(flows)
    if flows is None or isinstance(flows, str):
        return None if flows is None else Modes(flows)
    flows = {name: mode for name, mode in flows.items() if not isinstance(mode, Response)}
    if not flows:
        return None
    levels = {x.name for x in program.levels[1:]}
    metas = {program.inputs[i].name for i in program.metas}
    names = {x.declared: x.name for x in program.levels if x.declared}
    given = {_subject(names.get(name, name), levels, metas): mode for name, mode in flows.items()}
    asked = {mode for name, mode in given.items() if name in metas} | {m for m in given.values() if m == "forward"}
    if "forward" in asked and asked & {"reverse", "mixed"}:
        raise PlanError(
            f"flows={dict(flows)!r} asks for forward and reverse in one sweep",
            advice="all meta-parameters share the sweep through the loops: give all of them one mode",
        )
    if "forward" in asked:
        return Modes("forward")
    return Modes("mixed", _with_deeper(program, {n for n, m in given.items() if n in levels and m == "reverse"}))


def _with_deeper(program: Program, reverse: set[str]) -> dict[str, str]:
    """Levels in reverse, and those below: the mixed product of a deeper loop is never differentiated in reverse.

    (Doing so gave a wrong third derivative for Adam inside Adam, where all other combinations agree.)
    """
    top = min((x.depth for x in program.levels if x.name in reverse), default=len(program.levels))
    return {x.name: "reverse" for x in program.levels if x.name in reverse or x.depth > top}


def _subject(name: Any, levels: set[str], metas: set[str]) -> str:
    """The level or meta-parameter that a key of ``flows`` is about."""
    source, _, target = str(name).partition(" -> ")
    known = source in metas | levels and (not target or target in levels | {"L0"})
    if not isinstance(name, str) or not known:
        raise PlanError(
            f"flows names {name!r}, which is no level, meta-parameter or flow of this program",
            advice="there are " + ", ".join(sorted(levels) + sorted(metas)),
        )
    return source
