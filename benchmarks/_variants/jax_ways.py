"""JAX's ways (``mixflow.py``), compiled by XLA and ready to be measured."""

from typing import Any

import jax
from _workloads.workload import Workload

from _variants import mixflow
from _variants.prepared import Prepared, Skipped, flat

# One Jacobian column per meta-parameter: beyond this many, forward mode is no competitor.
MOST_FORWARD = 8


def saved(w: Workload) -> Prepared:
    """MixFlow-MG with inner gradients saved."""
    return compiled(w, lambda twin: mixflow.hypergradient(twin, mix=True, save=True, remat=True))


def recomputed(w: Workload) -> Prepared:
    """MixFlow-MG without saved inner gradients."""
    return compiled(w, lambda twin: mixflow.hypergradient(twin, mix=True, save=False, remat=True))


def default(w: Workload) -> Prepared:
    """What JAX does with a checkpoint around each inner step."""
    return compiled(w, lambda twin: mixflow.hypergradient(twin, mix=False, save=False, remat=False))


def forward(w: Workload) -> Prepared:
    """Forward mode through the whole loop."""
    count = sum(m.numel() for m in w.meta)
    if count > MOST_FORWARD:
        raise Skipped(f"forward mode is for few meta-parameters, here are {count}")
    return compiled(w, mixflow.forward)


def compiled(w: Workload, make: Any) -> Prepared:
    from _twins import build

    twin = build(w)
    arguments = twin.meta, twin.batches, twin.validation
    executable = jax.jit(make(twin)).lower(*arguments).compile()
    return Prepared(
        call=lambda: jax.block_until_ready(executable(*arguments)),
        gradient=lambda found: flat(twin.unpack(found[1])),
        facts=lambda: facts(executable),
    )


def facts(executable: Any) -> dict[str, Any]:
    """What XLA says: bytes of its scratch memory and of the results."""
    analysis = executable.memory_analysis()
    return {
        "jax": jax.__version__,
        "xla_temporary_bytes": analysis.temp_size_in_bytes,
        "xla_output_bytes": analysis.output_size_in_bytes,
        "planned_peak_bytes": analysis.temp_size_in_bytes + analysis.output_size_in_bytes,
    }
