"""Plans as files and as one screen."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import mlc
from mlc import units
from mlc.passes.planning.plan import VERSION, Decision
from mlc.view import tables
from mlc.view.plan import Plan
from tests import programs


def test_one_screen() -> None:
    text = mlc.plan(programs.one_path_stopped()).explain()
    assert "\x1b" not in text
    assert len(text.splitlines()) < 24
    words = [" ".join(line.split()) for line in text.splitlines()]
    assert words[0].startswith("plan for stopped: inner gradients differentiated in mixed mode")
    assert any(w.startswith("L1 SGD any") and "model.weight, model.bias" in w for w in words)
    assert "weigh.weight, weigh.bias -> L1 value reverse enters the loss" in words
    assert any(w.startswith("weigh.weight, weigh.bias -> L1 stop cut detach() or no_grad(), line") for w in words)


def test_decisions_stand_beside_their_flows() -> None:
    program = programs.two_levels()
    plan = mlc.plan(program).model_copy(
        update={
            "decisions": (
                Decision(
                    subject="L1",
                    choice="forward",
                    reason="few",
                    seconds=0.002,
                    bytes=3 << 20,
                    runner_up="mixed",
                ),
                Decision(subject="residuals", choice="none", reason="they fit"),
            ),
            "seconds": 1.5,
            "peak_bytes": 2048,
            "memory": 1 << 30,
        }
    )
    text = plan.bind(program).explain()
    words = [" ".join(line.split()) for line in text.splitlines()]
    assert "predicted 1.50 s, peak 2.0 KiB, budget 1.0 GiB" in words[0]
    assert "L1 -> L1 gradient forward few 2.0 ms 3.0 MiB mixed" in words
    assert "residuals none they fit" in words


def test_names_in_brackets_are_no_markup() -> None:
    assert "rate[0], rate[1] -> L1" in mlc.plan(programs.learned_rates()).explain()


def test_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = mlc.plan(programs.two_levels())
    monkeypatch.setattr(tables, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    assert "\x1b[" in plan.explain()


def test_words() -> None:
    assert tables.names_text(["a", "b", "c"]) == "a, b, c"
    assert tables.names_text(["a", "b", "c", "d"]) == "a, b and 2 more"
    assert [units.size_text(n) for n in (512, 2048, 3 << 40)] == ["512 B", "2.0 KiB", "3.0 TiB"]
    assert [units.time_text(s) for s in (2, 0.01, 3e-6)] == ["2.00 s", "10.0 ms", "3 us"]


# ---- files


def test_a_saved_plan_comes_back(tmp_path: Path) -> None:
    program = programs.two_levels()
    plan = mlc.plan(program)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.bound is None
    assert "a program (" in loaded.explain()
    assert Plan.load(tmp_path / "plan.json", program).bound is program


def test_a_plan_of_another_program_is_refused(tmp_path: Path) -> None:
    mlc.plan(programs.two_levels()).save(tmp_path / "plan.json")
    with pytest.raises(mlc.PlanError, match="belongs to another program"):
        Plan.load(tmp_path / "plan.json", programs.maml())


BAD = {
    "is no plan: Expecting": "{",
    "it has no version": "[]",
    "has no version": '{"program": "x"}',
    f"has version {VERSION + 1} of the format": json.dumps({"version": VERSION + 1, "new": 1}),
    "program: Field required": json.dumps({"version": VERSION}),
    "colour: Extra inputs": json.dumps({"version": VERSION, "program": "x", "colour": 1}),
    "slots: Input should be": json.dumps({"version": VERSION, "program": "x", "slots": "many"}),
}


@pytest.mark.parametrize("message", BAD)
def test_malformed_plans_are_refused(message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(BAD[message])
    with pytest.raises(mlc.PlanError, match=message) as e:
        Plan.load(tmp_path / "plan.json")
    assert "mlc.plan(program).save(path)" in e.value.advice


def test_a_missing_file_is_a_plan_error(tmp_path: Path) -> None:
    with pytest.raises(mlc.PlanError, match="No such file"):
        Plan.load(tmp_path / "none.json")
