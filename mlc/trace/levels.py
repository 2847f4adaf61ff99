"""Levels that the user declares: :func:`level`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mlc.errors import PlanError
from mlc.trace.recorder.tracer import Tracer

__all__ = ["level"]


@contextlib.contextmanager
def level(name: str, response: object = None) -> Iterator[None]:
    """Name the level that the training inside makes, and let gradients taken outside of it go through it.

    A gradient that the loop itself takes (``loss.backward()`` of an outer problem inside the compiled function) stops
    at parameters that were trained under ``opt.step()``, as in PyTorch.  Where the training stands in ``with
    mlc.level("inner"):``, a gradient taken after the block, outside of it, goes through that training: the gradient
    of the bilevel problem (best-response Jacobian of the unrolled training included; Franceschi et al. 2017, eq. 4).

    It has no effect outside of a compiled function: there PyTorch's gradients are what they are.

    Args:
        name: Of the level, as ``plan.explain()`` prints it.
        response: Reserved: how the derivative of what the level trained is obtained; must be None (exact unroll).

    Raises:
        PlanError: for a response.
    """
    if response is not None:
        raise PlanError(
            "responses other than the exact unroll are not available yet", advice="leave response out (exact unroll)"
        )
    tracer = Tracer.current
    if tracer is None:
        yield
        return
    tracer.declared.append(name)
    tracer.farther = True
    try:
        yield
    finally:
        tracer.declared.pop()
