"""Refusals that are right: what no compiler of exact gradients can follow, with the reason.

Everything else that is refused counts as a failure, above all what people write every day: data made by Python,
evaluation in between, models built or copied inside, `.data` rebound, checks by libraries, sizes, hooks. That there is
nothing to differentiate is believed only where differences of the plain function are exactly zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable

PATHLESS = r"no meta-parameter|has no path to the result"

LEGITIMATE: dict[str, str] = {
    r"no derivative: aten\.multi_margin_loss_backward": "PyTorch has no second derivative of it",
    r"no derivative: aten\._embedding_bag_backward": "PyTorch has no second derivative of it",
    r"a backward hook stands between the loop and its result": "PyTorch would run it outside of the call",
    r"PyTorch gets the second derivative of weight_norm wrong": "the loop's own number is no derivative",
}


def reason(message: str, zero: Callable[[set[str]], bool]) -> str:
    """Why a refusal is right, or nothing; `zero` finds out whether the derivative by what is named is zero."""
    for pattern, why in LEGITIMATE.items():
        if re.search(pattern, message):
            return why
    if re.search(PATHLESS, message) and zero(set(re.findall(r"\bmeta\.(\w+)", message))):
        return "what is named does not reach the result: differences are zero"
    return ""
