"""``mlc.check``: is the hypergradient right?  Two referees that share little with the compiler.

1. *Finite differences* of the user's own Python function, run eagerly, along random directions; samples whose
   distribution depends on tensors are those of the base point.  A difference cannot see a ``detach``, so where a
   loss reads a cut value that depends on a meta-parameter, the recording is perturbed instead, with the stopped
   values frozen, after it was seen to move as the function does while nothing is frozen.
2. The *plain unroll* (:mod:`mlc.check.recorded`): the recording, run eagerly under PyTorch's own autograd.  It is
   exact where PyTorch's formulas are; where differences confirm the compiled gradient and not the unroll's, the
   report says so, and the differences decide.

Everything runs on float64 copies (:mod:`mlc.check.sandbox`); nothing of the user's changes, random generators
included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlc.check.examination import Examination, UsersError
from mlc.check.function import line_of
from mlc.check.policy import hypergradient, policy_check
from mlc.check.policyreport import PolicyCheck
from mlc.check.report import CheckReport
from mlc.check.sandbox import Sandbox
from mlc.check.surroundings import placed, scaled, surroundings
from mlc.compiled.underlying import underlying
from mlc.errors import MlcError, PlanError
from mlc.passes.precision.policy import check_precision
from mlc.trace.capture import place_of

__all__ = ["CheckReport", "check"]


def check(fn: Callable[..., Any], *args: object, dtype: torch.dtype = torch.float64, precision: Any = None,
          **kwargs: object) -> CheckReport:  # fmt: skip
    """Compare the compiled hypergradient of a call with the plain unroll and with finite differences.

    The function runs about 25 times, on copies: parameters, optimizers, buffers and random generators stay
    as they are.  A Python generator given as argument is used up, as by a call.

    Args:
        fn: A training loop, compiled or not (then it is compiled with default options).
        *args: Its arguments.
        dtype: float64 to check in double precision (casts written in the loop stay); float32 to leave every
            type as it is, with tolerances to match.
        precision: A policy as for :func:`mlc.compile`, whose cost is reported as well (``report.precision``: cosine
            and norm beside the exact hypergradient); that of a compiled function without. Everything else is checked
            without it.
        **kwargs: Its keyword arguments.

    Returns:
        The report; ``report.ok`` is the verdict, ``str(report)`` names the meta-parameters that disagree.

    Raises:
        MlcError: when the function cannot be compiled, or cannot run in ``dtype``; with the line.
        Exception: what the function's own code raises.
    """
    if dtype not in (torch.float32, torch.float64):
        advice = "use torch.float64 or torch.float32"
        raise PlanError(f"mlc.check in {dtype}", loc=place_of(underlying(fn, args)[0]), advice=advice)
    fn, args, options = underlying(fn, args)
    options = {**options, "mesh": None}  # each process checks its own problem
    precision = options.get("precision") if precision is None else precision
    check_precision(precision)
    given = (args, kwargs)
    box = Sandbox(dtype)
    with surroundings(dtype):
        try:
            inside = box.enter(fn)
            args, kwargs = box.enter(args), box.enter(kwargs)
            box.ready()
            exam = Examination(box, inside, args, kwargs, scaled({**options, "precision": None}, dtype))
            report, exact = exam.report(), dict(zip(exam.names, exam.ours, strict=True))
        except UsersError as e:
            raise e.error from None
        except MlcError as e:
            placed(e, fn)
            raise
        except Exception as e:
            raise MlcError(
                f"the check failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}",
                loc=line_of(e) or place_of(fn),
                advice="this is a fault of mlc: please report it",
            ) from e
        finally:
            box.restore()
    if precision is None:
        return report
    with surroundings(torch.float32):
        return replace(report, precision=_policy(fn, given, {**options, "precision": precision}, exact, dtype))


def _policy(fn: Any, given: tuple[Any, Any], options: dict[str, Any], exact: dict[str, Tensor], dtype: torch.dtype
            ) -> PolicyCheck:  # fmt: skip
    """The hypergradient under a policy, on copies of the types that they are."""
    box = Sandbox(torch.float32)
    try:
        inside = box.enter(fn)
        args, kwargs = box.enter(given[0]), box.enter(given[1])
        box.ready()
        return policy_check(
            options["precision"],
            lambda policy: hypergradient(box, inside, args, kwargs, {**options, "precision": policy}),
            exact, dtype,
        )  # fmt: skip
    except MlcError as e:
        placed(e, fn)
        raise
    finally:
        box.restore()
