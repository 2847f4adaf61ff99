"""Levels that the user declares: :func:`level`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mlc.errors import PlanError
from mlc.ir.lowered.responses import Response
from mlc.trace.recorder.tracer import Tracer

__all__ = ["level"]


@contextlib.contextmanager
def level(name: str, response: Response | None = None) -> Iterator[None]:
    """Name the level that the training inside makes, and let gradients taken outside of it go through it.

    A gradient that the loop itself takes (``loss.backward()`` of an outer problem inside the compiled function) stops
    at parameters that were trained under ``opt.step()``, as in PyTorch.  Where the training stands in ``with
    mlc.level("inner"):``, a gradient taken after the block, outside of it, goes through that training: the gradient
    of the bilevel problem (best-response Jacobian of the unrolled training included; Franceschi et al. 2017, eq. 4).

    It has no effect outside of a compiled function: there PyTorch's gradients are what they are.

    Args:
        name: Of the level, as ``plan.explain()`` prints it.
        response: How the derivative of what the level trained is obtained (:class:`mlc.Implicit` and its kin); None:
            exactly, through every step (:class:`mlc.Unroll`). ``flows=`` of :func:`mlc.compile` goes before it.

    Raises:
        PlanError: for what is no response, and for two different ones of one name.
    """
    if response is not None and not isinstance(response, Response):
        given = f"{response.__name__} without ()" if isinstance(response, type) else repr(response)
        raise PlanError(f"response={given} of level {name!r}", advice='a response is mlc.Implicit("cg"), for example')
    tracer = Tracer.current
    if tracer is None:
        yield
        return
    if tracer.responses.setdefault(name, response) != response:
        raise PlanError(
            f"level {name!r} is declared with {response} and with {tracer.responses[name]}", loc=tracer.place(),
            advice="give the levels different names, or both the same response",
        )  # fmt: skip
    tracer.declared.append(name)
    tracer.farther = True
    try:
        yield
    finally:
        tracer.declared.pop()
