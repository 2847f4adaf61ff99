"""Backward hooks: on leaves and on what a step computes, of modules, after accumulation, of optimizers.

A hook changes the gradient that the loop takes, so the loop computes another value, and differences of the loop judge
the hypergradient as ever. A reference writes what the hook does into its gradients: hooks of a Learner's tensors would
run again when its result is differentiated, which is no derivative of the value.
"""

from types import ModuleType

from tests.numerics.program import Program, Suite, check_compiled, check_reference
from tests.numerics.refusals import Refusals, Refused, check_refused

EPS = 1e-3
SUITE = Suite()
REFUSED = Refusals()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


def test_refused(refused: Refused, mlc: ModuleType) -> None:
    check_refused(refused, mlc)
