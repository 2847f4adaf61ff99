"""mlc: a graph compiler for multilevel optimization programs in PyTorch.

    @mlc.compile
    def validate_after_training(model, weight_net, batches, val):
        opt = torch.optim.Adam(model.parameters(), lr=1e-3)
        for x, y in batches:
            opt.zero_grad()
            losses = F.cross_entropy(model(x), y, reduction="none")
            (weight_net(x) * losses).mean().backward()
            opt.step()
        return F.cross_entropy(model(val.x), val.y)

The result is connected to autograd: ``loss.backward()`` gives the exact gradient *through* the training.
"""

from mlc.api import plan, trace
from mlc.check.check import CheckReport, check
from mlc.compiled.compiled import CompiledFunction, compile
from mlc.draw import draw
from mlc.errors import (
    BudgetError,
    CaptureError,
    CommunicationError,
    DifferentiationError,
    LoweringWarning,
    MemoryWarning,
    MlcError,
    MlcWarning,
    NonfiniteError,
    PlanError,
    PrecisionWarning,
    ResponseWarning,
    RootWarning,
    SignWarning,
    SolverError,
    SolverWarning,
    TrainingError,
    VerifyError,
)
from mlc.implicit.root import fixed_point, root
from mlc.ir.lowered.contract import Pass
from mlc.ir.lowered.responses import (
    Evolution,
    FiniteDifference,
    FirstOrder,
    ForwardGradient,
    FullyFirstOrder,
    Implicit,
    Response,
    Truncated,
    Unroll,
)
from mlc.ir.program import Program
from mlc.notebook import Frame as _Frame  # noqa: F401 (tells notebooks how to show programs, plans and reports)
from mlc.passes.lowering.pipeline import PIPELINE
from mlc.passes.precision.policy import Precision
from mlc.runtime.interpreter.recording import recording
from mlc.trace.clone import clone
from mlc.trace.levels import level
from mlc.training.engine import Training
from mlc.training.game import Alternating, Simultaneous
from mlc.training.level import Level
from mlc.view.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "PIPELINE",
    "Alternating",
    "BudgetError",
    "CaptureError",
    "CheckReport",
    "CommunicationError",
    "CompiledFunction",
    "DifferentiationError",
    "Evolution",
    "FiniteDifference",
    "FirstOrder",
    "ForwardGradient",
    "FullyFirstOrder",
    "Implicit",
    "Level",
    "LoweringWarning",
    "MemoryWarning",
    "MlcError",
    "MlcWarning",
    "NonfiniteError",
    "Pass",
    "Plan",
    "PlanError",
    "Precision",
    "PrecisionWarning",
    "Program",
    "Response",
    "ResponseWarning",
    "RootWarning",
    "SignWarning",
    "Simultaneous",
    "SolverError",
    "SolverWarning",
    "Training",
    "TrainingError",
    "Truncated",
    "Unroll",
    "VerifyError",
    "check",
    "clone",
    "compile",
    "draw",
    "fixed_point",
    "level",
    "plan",
    "recording",
    "root",
    "trace",
]
