"""A call that computes one hypergradient, ready to be measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


class Skipped(Exception):
    """This way cannot be measured; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """One way to the hypergradient of one workload.

    Attributes:
        call: Computes (loss, gradient) and waits until they are there.
        gradient: What ``call`` returned to all numbers of the gradient, float64, in the workload's order.
        reset: Puts back what a call leaves changed; not measured.
        facts: What the tool itself says about the call: planned or analysed bytes and seconds.
    """

    call: Callable[[], Any]
    gradient: Callable[[Any], np.ndarray]
    reset: Callable[[], None] = lambda: None
    facts: Callable[[], dict[str, Any]] = dict


def flat(arrays: Any) -> np.ndarray:
    """Arrays or CPU tensors as one vector of float64."""
    return np.concatenate([np.asarray(x, dtype=np.float64).ravel() for x in arrays])


def of_tensors(found: Any) -> np.ndarray:
    return flat(g.detach().cpu() for g in found[1])
