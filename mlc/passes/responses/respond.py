"""Responses as rewrites: each turns the program into one with the same values and another derivative of a level.

What is left is an ordinary program, which is differentiated, planned and run like any other: nothing behind this pass
knows of responses.  Levels are taken from the deepest up, so that the one above finds the one below rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlc.errors import PlanError
from mlc.ir.core import Eqn
from mlc.ir.lowered.responses import (
    Evolution,
    FiniteDifference,
    FirstOrder,
    ForwardGradient,
    FullyFirstOrder,
    Implicit,
    Response,
    Truncated,
)
from mlc.ir.program import Level, Program
from mlc.passes.autodiff.policy import Policy
from mlc.passes.responses.estimates.evolution import evolution
from mlc.passes.responses.estimates.forwardgradient import forward_gradient
from mlc.passes.responses.estimates.fullyfirstorder import fully_first_order
from mlc.passes.responses.firstorder import first_order
from mlc.passes.responses.implicit import implicit
from mlc.passes.responses.site import Site
from mlc.passes.responses.truncated import truncated

__all__ = ["differences", "gradients_of", "respond"]


def respond(program: Program, responses: Mapping[str, Response], policy: Policy) -> Program:
    """The program whose plain derivative is what these responses ask for.

    Args:
        program: A traced program.
        responses: By name of the level.
        policy: How inner gradients are differentiated; stops.

    Raises:
        PlanError: where a response cannot apply.
    """
    gradients = {x.name: gradients_of(program, x) for x in program.levels if x.name in responses}
    whole = [x for x in program.levels if _persistent(responses.get(x.name))]
    if len(whole) > 1:
        names = " and ".join(x.title for x in whole)
        raise PlanError(
            f"levels {names} ask for Evolution(persistent=True), which each perturbs the whole call", loc=whole[1].loc,
            advice="ask it of one of them: the estimate holds for all ways through the call",
        )  # fmt: skip
    for level in sorted(program.levels, key=lambda x: (x in whole, -x.depth)):
        response = responses.get(level.name)
        if response is not None:
            program = _one(program, level, gradients[level.name], response, policy)
    return program


def _persistent(response: Response | None) -> bool:
    return isinstance(response, Evolution) and response.persistent


def _one(program: Program, level: Level, gradients: list[Eqn], response: Response, policy: Policy) -> Program:
    if isinstance(response, FiniteDifference):
        return program  # its rule stands where the product would (mlc.passes.autodiff.difference)
    if isinstance(response, FirstOrder):
        return first_order(program, gradients)
    site = Site(program, level, gradients)
    if isinstance(response, Truncated):
        return truncated(program, site, response)
    if isinstance(response, Implicit):
        return implicit(program, site, response, policy)
    if isinstance(response, Evolution):
        return evolution(program, site, response, policy)
    if isinstance(response, ForwardGradient):
        return forward_gradient(program, site, response, policy)
    if isinstance(response, FullyFirstOrder):
        return fully_first_order(program, site, response, policy)
    return program


def differences(program: Program, responses: Mapping[str, Response]) -> dict[Eqn, float | None]:
    """Gradients whose second-order products are differences, with their step."""
    found: dict[Eqn, float | None] = {}
    for level in program.levels:
        response = responses.get(level.name)
        if isinstance(response, FiniteDifference):
            found.update((e, response.eps) for e in gradients_of(program, level))
    return found


def gradients_of(program: Program, level: Level) -> list[Eqn]:
    """The gradient equations of a level."""
    return [e for _, e in program.places(level)]
