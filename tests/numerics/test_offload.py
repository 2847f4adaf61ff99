"""Saved tensors on the host are exact: against the float64 references, beside every other lever."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest

import mlc.compiled.entry
from mlc.ir.core import Loop
from mlc.ir.lowered.contract import Levers
from mlc.ir.lowered.stages import Stages
from mlc.ir.verify import verify
from mlc.passes.planning.planned import joint_of
from mlc.view.plan import Plan
from tests.numerics import test_data, test_epochs, test_levels
from tests.numerics.program import Program, check_compiled
from tests.numerics.test_optimizers import make
from tests.passes.finishing import finish

CASES = [(o, "mlp", 5) for o in ("sgd", "sgd_nesterov", "adam", "adamw_amsgrad", "rmsprop_both", "adafactor")]
CASES += [("adam", "convbn", 4), ("adam", "lstm", 4), ("sgd_momentum", "transformer", 4)]
LEVERS = {
    "all kept": Levers(),
    "residuals": Levers(1e-9),
    "states of few trips": Levers(0.0, 3),
    "replays of steps": Levers(1e-3, 2),
    "replays from the start": Levers(1e-9, 1),
}


class Hosted:
    """Lowers with other levers than the plan's, and counts the sequences that rest on the host."""

    def __init__(self, levers: Levers) -> None:
        self.levers = replace(levers, offload=1)
        self.sequences = 0

    def __call__(self, program: Any, plan: Plan) -> Stages:
        stages = finish(joint_of(program, plan), self.levers)
        for region in (stages.forward, stages.backward):
            if region is not None:
                verify(region)
                self.sequences += sum(len(e.op.host) for e in region.walk() if isinstance(e.op, Loop))
        return stages


@pytest.fixture(params=LEVERS.values(), ids=list(LEVERS))
def hosted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosted]:
    stand_in = Hosted(request.param)
    monkeypatch.setattr(mlc.compiled.entry, "stages_for", stand_in)
    yield stand_in
    assert stand_in.sequences


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_models_and_optimizers(case: tuple[str, str, int], hosted: Hosted, mlc: ModuleType) -> None:
    check_compiled(Program(partial(make, *case)), mlc, "mixed")


NESTED = [p for suite in (test_levels.SUITE, test_epochs.SUITE) for p in suite]


@pytest.mark.parametrize("case", NESTED, ids=lambda p: p.name)
@pytest.mark.parametrize("levers", [Levers(), Levers(1e-3, 2)], ids=["all kept", "replays of steps"])
def test_loops_in_loops(case: Program, levers: Levers, monkeypatch: pytest.MonkeyPatch, mlc: ModuleType) -> None:
    stand_in = Hosted(levers)
    monkeypatch.setattr(mlc.compiled.entry, "stages_for", stand_in)
    check_compiled(case, mlc)


@pytest.mark.parametrize("case", test_data.SUITE, ids=lambda p: p.name)
def test_drawn_batches(case: Program, monkeypatch: pytest.MonkeyPatch, mlc: ModuleType) -> None:
    monkeypatch.setattr(mlc.compiled.entry, "stages_for", Hosted(Levers(1e-9, 2)))
    check_compiled(case, mlc)
