"""The workloads once more as JAX functions, made from the tensors of the PyTorch ones."""

from collections.abc import Callable

from _workloads.workload import Workload

from _twins import conv, mlp, transformer
from _twins.twin import Twin

BUILDERS: dict[str, Callable[[Workload], Twin]] = {
    "W1": transformer.build,
    "W2": transformer.build,
    "digits": conv.build,
    "rates": mlp.rates,
    "hyperparameters": mlp.hyperparameters,
}


def build(w: Workload) -> Twin:
    return BUILDERS[w.name](w)
