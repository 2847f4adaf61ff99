"""The sequence of collectives that a program runs: what must be the same on every one of its processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch._ops import OpOverload

from mlc.ir.communication.collectives import group_of, is_collective
from mlc.ir.core import Alias, Eqn, Loop, Region, Stop, Var
from mlc.ir.keys import equation_key
from mlc.ir.literals import type_text

__all__ = ["communicates", "fingerprint", "sequence"]


def _within(region: Region) -> Iterator[tuple[Eqn, str]]:
    """Collectives in the order in which they run, with the loops around them, and which one they repeat, as text."""
    repeated = _repeats(region)
    for e in region.eqns:
        if isinstance(e.op, Loop):
            how = f"loop[{e.op.trips}{',reverse' if e.op.reverse else ''}] "
            yield from ((x, how + around) for x, around in _within(e.op.body))
            if e.op.replay is not None:
                how = f"replay[{e.op.trips},{e.op.replay.slots}] "
                yield from ((x, how + around) for x, around in _within(e.op.replay.body))
        elif is_collective(e):
            yield e, repeated.get(e, "")
        else:
            for body in _bodies(e):
                yield from _within(body)


def _repeats(region: Region) -> dict[Eqn, str]:
    """Collectives that are the same function of the same values as an earlier one, as far as this process knows.

    Passes take them for one.  That is right if it is so on every process: hence it belongs to what must be the same.
    """
    mine = [e for e in region.eqns if is_collective(e)]
    if len(mine) < 2:
        return {}
    numbers: dict[Var, Any] = {}
    known: dict[Any, int] = {}
    place: dict[int, int] = {}
    out: dict[Eqn, str] = {}
    for e in region.eqns:
        if isinstance(e.op, Alias | Stop):
            numbers.update((o, numbers.get(a, a)) for o, a in zip(e.outs, e.args, strict=False))
            continue
        key = object() if e.impure else equation_key(e, lambda v: ("value", numbers.get(v, v)))
        n = known.setdefault(key, len(known))
        numbers.update((v, (n, i)) for i, v in enumerate(e.outs))
        if is_collective(e):
            first = place.setdefault(n, len(place))
            if first != len(place) - 1:
                out[e] = f"repeats {first}: "
    return out


def _bodies(e: Eqn) -> Iterator[Region]:
    """Regions inside other primitives (the backward of a custom Function, a fused segment)."""
    for value in vars(e.op).values() if not isinstance(e.op, OpOverload) else ():
        if isinstance(value, Region):
            yield value


def communicates(region: Region) -> bool:
    """Whether anything in a region communicates."""
    return next(_within(region), None) is not None


def sequence(region: Region) -> list[tuple[str, Any]]:
    """What a region communicates, in order: a text that must be the same on every process, and the user's line.

    The text names the operator, its literals, the type of the value, the loops around it, and its group by the order
    in which groups are used: on another process the group beside this one has another name.
    """
    order: dict[str, int] = {}
    return [(f"{around}{_said(e, order)}", e.loc) for e, around in _within(region)]


def _said(e: Eqn, order: dict[str, int]) -> str:
    assert isinstance(e.op, OpOverload)
    x = e.args[0]
    assert type(x) is Var
    role = order.setdefault(group_of(e), len(order))
    rest = ", ".join([*map(str, e.args[1:-1]), f"group {role}"])
    return f"{e.op._schema.name.split('::')[1]}({type_text(x.type)}, {rest})"


def fingerprint(said: list[str]) -> int:
    """63 bits of a list of texts."""
    return int.from_bytes(hashlib.sha256("\n".join(said).encode()).digest()[:8], "big") >> 1
