"""The workloads of planner.py by name. Each is built at two sizes: as measured, and tiny (``--quick``)."""

from collections.abc import Callable

import torch

from _workloads import digits, hyperparameters, rates, transformer
from _workloads.workload import Workload

BUILDERS: dict[str, Callable[[bool, torch.dtype], Workload]] = {
    "W1": transformer.w1,
    "W2": transformer.w2,
    "digits": digits.build,
    "rates": rates.build,
    "hyperparameters": hyperparameters.build,
}


def build(name: str, quick: bool, dtype: torch.dtype = torch.float32) -> Workload:
    """A workload; initial values and data are those of float32 whatever ``dtype`` is."""
    return BUILDERS[name](quick, dtype)
