"""Whether C code that asks for a float is ``"..." % value``: formatting only observes, anything else may do everything.

The interpreter is asked which instruction runs in the frame that called, and where the left operand of its ``%`` came
from.  Only what is certainly a text counts (a constant, an f-string, a variable or attribute that holds one): ``%`` of
an array reads numbers too.
"""

from __future__ import annotations

import dis
import types
from functools import lru_cache
from typing import Any

__all__ = ["formats"]

_OPERATORS: Any = dis._nb_ops  # type: ignore[attr-defined]
_REMAINDERS = {i for i, (_, symbol) in enumerate(_OPERATORS) if symbol in ("%", "%=")}
_TEXT = (str, bytes, bytearray)


def formats(frame: types.FrameType) -> bool:
    """Whether the frame is at a ``%`` with a text on its left."""
    code, at = frame.f_code, frame.f_lasti
    if dis.opname[code.co_code[at]] != "BINARY_OP" or code.co_code[at + 1] not in _REMAINDERS:
        return False
    kind, *names = _left(code, at)
    if kind == "name":
        return isinstance(_variable(frame, names[0]), _TEXT)
    if kind == "attribute":
        return isinstance(_attribute(_variable(frame, names[0]), names[1]), _TEXT)
    return kind == "text"


@lru_cache(4096)
def _left(code: types.CodeType, at: int) -> tuple[str, ...]:
    """What the left operand of the instruction at ``at`` is: ("text",), ("name", x), ("attribute", x, y) or others."""
    before = [
        i for i in dis.get_instructions(code) if i.offset < at and i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")
    ]
    depth = 0
    while depth < 1:  # back to where the right operand begins
        if not before:
            return ("unknown",)
        step = before.pop()
        if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs or step.is_jump_target:
            return ("unknown",)
        depth += dis.stack_effect(step.opcode, step.arg if step.opcode >= dis.HAVE_ARGUMENT else None)
    if depth > 1:  # two variables pushed by one instruction
        return ("name", str(step.argval[0])) if isinstance(step.argval, tuple) and depth == 2 else ("unknown",)
    if not before:
        return ("unknown",)
    left = before.pop()
    if left.opname == "LOAD_CONST":
        return ("text",) if isinstance(left.argval, _TEXT) else ("unknown",)
    if left.opname in ("BUILD_STRING", "FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC"):
        return ("text",)
    if left.opname.startswith(("LOAD_FAST", "LOAD_NAME", "LOAD_GLOBAL", "LOAD_DEREF")):
        return ("name", str(left.argval[-1] if isinstance(left.argval, tuple) else left.argval))
    if left.opname == "LOAD_ATTR" and before and before[-1].opname.startswith("LOAD_FAST"):
        owner = before[-1].argval
        return ("attribute", str(owner[-1] if isinstance(owner, tuple) else owner), str(left.argval))
    return ("unknown",)


def _variable(frame: types.FrameType, name: str) -> Any:
    for scope in (frame.f_locals, frame.f_globals):
        if name in scope:
            return scope[name]
    return None


def _attribute(x: object, name: str) -> Any:
    own = getattr(x, "__dict__", {})
    if name in own:
        return own[name]
    return next((vars(c)[name] for c in type(x).__mro__ if name in vars(c)), None)
