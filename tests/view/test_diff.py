"""Two plans side by side."""

from pathlib import Path

import mlc
from mlc.passes.planning.plan import Decision
from mlc.view.diff import changes, compare
from mlc.view.plan import Plan
from tests import programs


def plans() -> tuple[Plan, Plan]:
    plan = mlc.plan(programs.two_levels())
    same = Decision(subject="L1", choice="mixed", reason="forward over reverse")
    old = Decision(subject="states", choice="all kept", reason="they fit", seconds=0.0, bytes=8 << 20)
    new = Decision(subject="states", choice="every 4th", reason="the budget", seconds=0.5, bytes=2 << 20)
    a = plan.model_copy(update={"decisions": (same, old), "seconds": 1.0, "peak_bytes": 10 << 20})
    b = plan.model_copy(update={"decisions": (same, new), "seconds": 1.5, "peak_bytes": 4 << 20, "memory": 5 << 20})
    return a, b


def test_it_says_what_changed_and_what_that_does() -> None:
    a, b = plans()
    words = [" ".join(line.split()) for line in compare(a, b).splitlines()]
    assert "time 1.00 s 1.50 s +50.0%" in words
    assert "peak memory 10.0 MiB 4.0 MiB -60.0%" in words
    assert "memory - 5242880" in words
    assert "states all kept every 4th +500.0 ms -6.0 MiB the budget" in words
    assert not any(w.startswith("L1") for w in words)
    assert changes(a, b) == {"settings": ["memory"], "decisions": ["states"]}


def test_equal_plans(tmp_path: Path) -> None:
    a, _ = plans()
    a.save(tmp_path / "a.json")
    assert compare(a, Plan.load(tmp_path / "a.json")) == "the plans are equal\n"


def test_plans_of_other_programs_are_said_to_be() -> None:
    a, _ = plans()
    assert "belong to different programs" in compare(a, mlc.plan(programs.maml()))
