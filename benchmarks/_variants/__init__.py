"""The ways to a hypergradient that planner.py compares, by name: each prepares a call for a workload.

Each way lives in a module that is imported only when it is asked for, so that no process holds the libraries of
another way.
"""

from collections.abc import Callable
from importlib import import_module

from _workloads.workload import Workload

from _variants.prepared import Prepared, Skipped

__all__ = ["COMPETITORS", "Prepared", "Skipped", "prepare"]

# Name -> (module, what it is called there).
COMPETITORS = {
    "plain": ("torch_ways", "plain"),
    "checkpoint": ("torch_ways", "checkpoint"),
    "torchopt": ("torchopt_way", "unrolled"),
    "reverse": ("torch_ways", "reverse"),
    "mixflow-saved": ("jax_ways", "saved"),
    "mixflow": ("jax_ways", "recomputed"),
    "jax-checkpoint": ("jax_ways", "default"),
    "jax-forward": ("jax_ways", "forward"),
}


def prepare(name: str, w: Workload, backend: str) -> Prepared:
    """A call for a competitor, or for mlc with a budget: ``mlc:none``, ``mlc:min``, ``mlc:BYTES``.

    Raises:
        Skipped: when this way cannot be had here, or cannot do the workload.
    """
    if name.startswith("mlc:"):
        return import_module("_variants.mlc_way").compiled(w, name.removeprefix("mlc:"), backend)
    module, function = COMPETITORS[name]
    try:
        make: Callable[[Workload], Prepared] = getattr(import_module(f"_variants.{module}"), function)
    except ImportError as e:
        raise Skipped(f"needs {e.name}: pip install -e '.[bench]'") from None
    return make(w)
