"""Refusals that are right: what no compiler of exact gradients can follow, with the reason.

Everything else that is refused counts as a failure, above all reasons of kinds 11 to 17 of the promise: data made by
Python, evaluation in between, models built or copied inside, `.data` rebound, checks by libraries, sizes, hooks.
"""

from __future__ import annotations

import re

LEGITIMATE: dict[str, str] = {
    r"meta-parameter .* has no path to the result: it is cut": "the only path is cut by the program",
    r"no meta-parameter": "nothing to differentiate",
}


def reason(message: str, traits: set[str]) -> str:
    """Why a refusal is right, or nothing."""
    for pattern, why in LEGITIMATE.items():
        if re.search(pattern, message) and "cut" in traits:
            return why
    return ""
