"""Continuing bit for bit: from a state, from a checkpoint of a process that was killed, past a broken file."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mlc
from mlc.training.state.archive import Frozen
from mlc.training.state.checkpoints import Checkpoints
from tests.training.problems import Problem, square
from tests.training.restart import STEPS, build
from tests.training.test_graphs import bilevel

ROOT = Path(__file__).parents[2]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), f"{k} differs by {(a[k] - b[k]).abs().max():.1e}"


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    training, tensors = build()
    training.run(STEPS)
    return {k: v.detach().clone() for k, v in tensors.items()}


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_state_continues_bit_for_bit_in_the_middle_of_an_epoch(at: int, uninterrupted: dict[str, Tensor]) -> None:
    first, _ = build()
    first.run(at)
    state = first.state_dict()
    first.run(2)  # what happens to it afterwards is nothing to the state
    second, tensors = build()
    torch.manual_seed(1234)
    second.load_state_dict(state)
    assert second.step == at
    second.run(STEPS - at)
    equal({k: v.detach() for k, v in tensors.items()}, uninterrupted)


def test_the_state_is_plain_data(tmp_path: Path) -> None:
    training, _ = build()
    training.run(1)
    torch.save(training.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again, _ = build()
    again.load_state_dict(state)
    assert again.step == 1


def process(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tests.training.restart", str(folder), *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    at = random.SystemRandom().randrange(3, STEPS)
    killed = process(tmp_path, str(at))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "result.pt").exists()
    done = process(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"after step {(at - 1) // 2 * 2}" in done.stderr
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    equal(result, uninterrupted)


# ---- folders of checkpoints, on something small


def small(**options: Any) -> tuple[mlc.Training, dict[str, Tensor]]:
    p = bilevel()
    return mlc.Training([p.level("w", 1), p.level("u")], **options), {k: v.detach() for k, v in p.params.items()}


def test_checkpoints_are_whole_files_and_three_are_kept(tmp_path: Path) -> None:
    training, _ = small()
    (tmp_path / "step-0000000009.mlc.77.new").write_text("left by a killed process")
    training.run(7, checkpoint=tmp_path, every=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"step-{k:010d}.mlc" for k in (4, 6, 7)]


def test_a_broken_checkpoint_is_passed_over_with_a_message(tmp_path: Path) -> None:
    training, wanted = small()
    training.run(6, checkpoint=tmp_path, every=2)
    newest = tmp_path / "step-0000000006.mlc"
    newest.write_bytes(newest.read_bytes()[:-200])
    again, tensors = small()
    with pytest.warns(mlc.MlcWarning, match=r"step-0000000006.mlc cannot be read .* the one before it is used"):
        again.run(6, checkpoint=tmp_path, every=2)
    assert again.step == 6
    equal(tensors, wanted)


def test_only_broken_checkpoints_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "step-0000000006.mlc").write_text("nothing")
    training, _ = small()
    with pytest.raises(mlc.TrainingError, match=r"no checkpoint in .* can be read"):
        training.run(1, checkpoint=tmp_path)


def test_the_same_program_started_again_does_what_is_left(tmp_path: Path) -> None:
    """Two runs in one program, killed in the second."""
    whole, wanted = small()
    whole.run(3)
    whole.run(4)
    first, _ = small()
    first.run(3, checkpoint=tmp_path, every=1)
    first.run(2, checkpoint=tmp_path, every=1)  # as if killed after two of four: its last state says so
    state = mlc.training.load_checkpoint(tmp_path / "step-0000000005.mlc")
    Checkpoints(tmp_path).write(5, Frozen.of({**state, "end": 3}))
    again, tensors = small()
    again.run(3, checkpoint=tmp_path, every=1)
    assert again.step == 5
    again.run(4, checkpoint=tmp_path, every=1)
    assert again.step == 7
    equal(tensors, wanted)
    assert again.run(2, checkpoint=tmp_path) and again.step == 9


def test_states_of_other_trainings_are_refused() -> None:
    training, tensors = small()
    before = {k: v.clone() for k, v in tensors.items()}
    state = training.state_dict()
    other = bilevel()
    with pytest.raises(mlc.TrainingError, match=r"of levels \['w', 'u'\], not of \['u'\]"):
        mlc.Training(
            [mlc.Level("u", other.params["u"], torch.optim.SGD, lambda: other.params["u"].sum())]
        ).load_state_dict(state)
    state["levels"]["w"]["params"] = [torch.zeros(5)]
    with pytest.raises(mlc.TrainingError, match="level 'w': its parameters have shapes"):
        training.load_state_dict(state)
    with pytest.raises(mlc.TrainingError, match="no state of a training"):
        training.load_state_dict({"model": 1})
    equal(tensors, before)


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda s: s.update(format=0), "of format 0"),
    "groups": (lambda s: s["levels"]["w"]["optimizer"].update(groups=[]), "another number of parameter groups"),
    "scheduler": (lambda s: s["levels"]["w"].update(scheduler={}), "only one of it and the state has a scheduler"),
    "generators": (lambda s: s.update(kinds=["torch Generator"]), "lacks what the losses now write to or draw from"),
    "written": (lambda s: s.update(written={}), "lacks what the losses now write to or draw from"),
    "cold starts": (lambda s: s.update(starts={}), "cold starts of"),
    "plans": (lambda s: s.update(plans=[]), "plans of 0 steps"),
    "callbacks": (lambda s: s.update(callbacks=[{}]), "1 callbacks' states"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_does_not_fit_changes_nothing(name: str) -> None:
    p, seen = bilevel(), torch.zeros(())

    def inner(batch: Tensor) -> Tensor:
        seen.add_(1)
        return p.losses["w"](p.params, batch)

    w = mlc.Level("w", p.params["w"], torch.optim.SGD([p.params["w"]], lr=0.1), inner, p.data["w"], start="cold")
    training = mlc.Training([w, p.level("u")])
    training.run(1)
    state = training.state_dict()
    training.run(1)
    before = {k: v.detach().clone() for k, v in p.params.items()}
    edit, said = STATES[name]
    edit(state)
    with pytest.raises(mlc.TrainingError, match=said):
        training.load_state_dict(state)
    equal({k: v.detach() for k, v in p.params.items()}, before)
    with pytest.raises(mlc.TrainingError, match="no state of a training"):
        training.load_state_dict(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("nested", [False, True])
def test_a_cold_start_goes_back_to_where_the_first_run_began(nested: bool) -> None:
    """Not to the weights that a process which continues was started with."""

    def made(shift: float) -> tuple[mlc.Training, dict[str, Tensor]]:
        losses = bilevel().losses
        top = {"t": lambda v, b: square(b @ (v["w"] - v["u"])) + square(v["t"] - v["u"])} if nested else {}
        p = Problem(**losses, **top)
        with torch.no_grad():
            p.params["w"].add_(shift)
        opt = torch.optim.SGD([p.params["w"]], lr=0.1, momentum=0.9)
        cold = p.level("w", 2, optimizer=opt, start="cold")
        above = [p.level("u", 2), p.level("t")] if nested else [p.level("u")]
        return mlc.Training([cold, *above]), {k: v.detach() for k, v in p.params.items()}

    first, wanted = made(0.0)
    first.run(2)
    state = first.state_dict()
    first.run(3)
    again, found = made(0.7)
    again.load_state_dict(state)
    again.run(3)
    equal(found, wanted)


def test_a_loss_that_counts_in_python_is_told_of(tmp_path: Path) -> None:
    p, counted = bilevel(), []
    first = p.losses["w"]

    def loss(v: Any, b: Tensor) -> Tensor:
        counted.append(1)
        return first(v, b)

    p.losses["w"] = loss
    training = mlc.Training([p.level("w"), p.level("u")])
    with pytest.warns(mlc.MlcWarning, match="level 'w' changes what no checkpoint contains: .*counted"):
        training.run(1, checkpoint=tmp_path)


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    class Odd:
        def __call__(self, event: mlc.training.Event) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"me": self}

        def load_state_dict(self, state: Any) -> None: ...

    training, _ = small(callbacks=[Odd()])
    with pytest.raises(mlc.TrainingError, match="the state cannot be saved"):
        training.run(1, checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())
