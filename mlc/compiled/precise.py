"""What a precision policy costs on the user's own first call: the exact plan runs beside it, once.

Under a policy results differ from the recorded run by rounding of the narrow types, which no tolerance tells from a
fault.  So the exact program, with the same decisions about memory, is held against the recorded run as always; then
both are differentiated with cotangents of one, and the policy's hypergradient is compared with the exact one.  That
takes one forward run and two backward runs more at the first call of a program (further forward runs where rounding has
to be measured), and as much memory as the exact plan, which must fit the budget, too; nothing at later calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlc.errors import BudgetError
from mlc.ir.core import Region
from mlc.ir.lowered.decision import Decision
from mlc.ir.program import Program
from mlc.passes.cost.equations import device_of
from mlc.passes.cost.memory import peak_bytes
from mlc.passes.planning.planned import stages_of_plan
from mlc.runtime.call import Executor, Run
from mlc.units import size_text
from mlc.view.plan import Plan, make_plan

__all__ = ["Exact", "PrecisionCost", "compare_with", "cost_of", "differs", "run_exact", "with_cost"]

COSINE, NORM = 0.99, 0.1  # least cosine, largest relative error of the norm, without a warning
SUBJECT = "precision cost"


@dataclass(frozen=True)
class PrecisionCost:
    """How far a policy's numbers are from the exact ones, on one call.

    Attributes:
        cosine: Between the two hypergradients, all meta-parameters together; NaN when one is not finite.
        norm: Norm of the policy's hypergradient over that of the exact one.
        value: Largest relative error of a returned value.
        missing: Why it could not be measured; empty when it was.
    """

    cosine: float = float("nan")
    norm: float = float("nan")
    value: float = float("nan")
    missing: str = ""

    @property
    def ok(self) -> bool:
        """Whether the hypergradient may be used without a warning."""
        return not self.missing and self.cosine >= COSINE and abs(self.norm - 1) <= NORM

    @property
    def warning(self) -> str:
        """What to say where it is not."""
        if self.missing:
            return f"precision: what the policy costs is not known: {self.missing}. Try: more memory, or mlc.check"
        return (
            f"precision: the hypergradient under this policy is far from the exact one on this call: {self}. Try: "
            "precision=None, a policy for fewer levels, update rules that do not divide by small gradients (a larger "
            "eps in Adam), or mlc.check(..., precision=...)"
        )

    def __str__(self) -> str:
        if self.missing:
            return f"not measured: {self.missing}"
        return f"cosine {self.cosine:.6f}, norm {self.norm:.4f}, values {self.value:.1e}"


def differs(plan: Plan, region: Region) -> bool:
    """Whether a plan's numbers are not those of the exact plan: TensorFloat-32 changes none on a CPU."""
    if plan.precision is None:
        return False
    return plan.precision.rewrites or (bool(plan.precision.matmul) and device_of(region).type == "cuda")


def exact_executor(program: Program, plan: Plan, options: dict[str, Any]) -> Executor:
    """The exact program, ready to run: with the policy's levers, or planned for the budget where these do not fit it.

    Raises:
        BudgetError: when no exact plan fits.
    """
    exact = plan.model_copy(update={"precision": None})
    stages = stages_of_plan(program, exact, plan.pipeline)
    if plan.memory is not None and peak_bytes(stages) > plan.memory:
        made = make_plan(program, **{**options, "precision": None, "levers": None, "memory": plan.memory})
        stages = made.stages
    return Executor(stages)


def gradient_of(executor: Executor, run: Run, keep: bool) -> list[Tensor | None]:
    """The hypergradient for cotangents of one, one entry per gradient of the stages."""
    if not executor.stages.cotangents:
        return []
    seeds = [torch.ones_like(run.results[i]) for i in executor.stages.cotangents]
    found = executor.backward(run, seeds, keep)
    run.seconds.pop("backward", None)
    return list(found)


def compare_with(exact: Sequence[Tensor | None], mine: Sequence[Tensor | None],
                 values: Sequence[tuple[Any, Any]]) -> PrecisionCost:  # fmt: skip
    """The cost of a policy.

    Args:
        exact: Hypergradients of the exact plan.
        mine: The same under the policy.
        values: Pairs of returned values, the policy's and the exact ones.
    """
    both = [(a, b) for a, b in zip(mine, exact, strict=True) if a is not None and b is not None]
    pairs = [(a.double(), b.double()) for a, b in both]
    a, b = (sum(float(x.square().sum()) for x in side) ** 0.5 for side in (list(zip(*pairs, strict=True)) or [(), ()]))
    product = sum(float((x * y).sum()) for x, y in pairs)
    cosine = 1.0 if a == b == 0 else product / (a * b) if a and b else 0.0
    norm = 1.0 if a == b == 0 else a / b if b else float("inf")
    return PrecisionCost(cosine, norm, max([_error(x, y) for x, y in values], default=0.0))


def _error(x: Any, y: Any) -> float:
    if not isinstance(y, Tensor) or not y.dtype.is_floating_point or not y.numel():
        return 0.0
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / max(float(y.norm()), 1e-300)) if x.shape == y.shape else float("inf")


def with_cost(plan: Plan, cost: PrecisionCost) -> Plan:
    """The plan with what was measured among its decisions."""
    said = Decision(subject=SUBJECT, choice=str(cost), reason="first call, against the exact plan")
    kept = tuple(d for d in plan.decisions if d.subject != SUBJECT)
    return plan.model_copy(update={"decisions": (*kept, said)})


@dataclass(frozen=True)
class Exact:
    """What the exact program computed from where the recorded run began.

    Attributes:
        results: Returned values.
        gradients: Hypergradients for cotangents of one.
    """

    results: list[Any]
    gradients: list[Tensor | None]


def run_exact(program: Program, plan: Plan, options: dict[str, Any], forward: Callable[[Executor], Run],
              reproduces: Callable[[Executor, Run], None]) -> Exact | str:  # fmt: skip
    """Run the exact program of a plan under a policy; why not, where it does not fit the budget.

    Args:
        program: The program.
        plan: Its plan.
        options: Those of planning.
        forward: Runs a forward stage from the state before the call.
        reproduces: Compares a run with the recorded one, and raises where they differ.
    """
    try:
        executor = exact_executor(program, plan, options)
    except BudgetError as why:
        return f"the exact plan needs at least {size_text(why.least)}, the budget is {size_text(plan.memory or 0)}"
    run = forward(executor)
    reproduces(executor, run)
    found = gradient_of(executor, run, False)
    return Exact(list(run.results[: program.n_outputs]), found)


def cost_of(executor: Executor, run: Run, exact: Exact | str) -> PrecisionCost:
    """The cost of a policy whose forward stage has run; what its backward stage reads is kept."""
    if isinstance(exact, str):
        return PrecisionCost(missing=exact)
    mine = gradient_of(executor, run, True)
    return compare_with(exact.gradients, mine, list(zip(run.results, exact.results, strict=False)))
