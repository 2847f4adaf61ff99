"""Refusals that are right: what no compiler of exact gradients can follow, with the reason.

Everything else that is refused counts as a failure, above all reasons of kinds 11 to 17 of the promise: data made by
Python, evaluation in between, models built or copied inside, `.data` rebound, checks by libraries, sizes, hooks.
"""

from __future__ import annotations

import re

LEGITIMATE: dict[str, str] = {
    r"meta-parameter .* has no path to the result: it is cut": "the only path is cut by the program",
    r"no derivative: aten\.multi_margin_loss_backward": "PyTorch has no second derivative of it",
    r"no derivative: aten\._embedding_bag_backward": "PyTorch has no second derivative of it",
}


def reason(message: str, traits: set[str]) -> str:
    """Why a refusal is right, or nothing."""
    for pattern, why in LEGITIMATE.items():
        if re.search(pattern, message) and ("cut" in traits or "cut" not in why):
            return why
    return ""
