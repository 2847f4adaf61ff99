"""Every fault still applies, a few are seen by the tests, and (slow) at least 95% of all are."""

import ast
from pathlib import Path

import pytest

from tests.mutation import run
from tests.mutation.fault import ROOT, Fault, Misplanted
from tests.mutation.faults import FAULTS

# One of each kind, with tests that take seconds.
SAMPLE = ("root_without_its_half", "the_dearer_of_keeping_and_making_is_chosen", "infinities_make_everything_equal")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_place_and_its_tests(name: str) -> None:
    """It is found exactly once and is Python still; nothing but a fault of its own kind, in a file that exists."""
    fault = FAULTS[name]
    source = fault.path.read_text()
    assert ast.dump(ast.parse(fault.planted(source))) != ast.dump(ast.parse(source))
    for test in fault.tests:
        file, _, function = test.partition("::")
        text = (ROOT / file).read_text()
        assert not function or f"def {function.partition('[')[0]}(" in text, test


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 40
    rooms = {f.module.split(".")[1] for f in FAULTS.values()}
    assert rooms >= {"passes", "ir", "runtime", "compiled", "trace", "record", "check"}


def test_a_fault_that_lost_its_place_says_so() -> None:
    fault = Fault("gone", "mlc.units", "no such text", "", ("tests/test_api.py",))
    with pytest.raises(Misplanted, match=r"0 places in mlc\.units"):
        fault.planted(fault.path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_planted_fault_is_seen(name: str) -> None:
    before = FAULTS[name].path.read_bytes()
    verdict = run.judge(FAULTS[name])
    assert verdict.kind == "killed", verdict
    assert FAULTS[name].path.read_bytes() == before


@pytest.mark.slow
def test_what_changes_nothing_is_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a verdict is kept until mlc or a test changes."""
    monkeypatch.setattr(run, "KEPT", tmp_path / "kept.json")
    harmless = Fault("harmless", "mlc.units", '"""', '"""', ("tests/mutation/test_mutation.py::test_there_are_enough",))
    source = harmless.path.read_text()
    same = Fault("harmless", "mlc.units", source, source + "\n", harmless.tests)
    said: list[str] = []
    broken = run.judged({"harmless": same}, 1, said.append)["harmless"]
    assert broken.kind == "broken" and len(said) == 1  # the test never imports the module
    same = Fault("harmless", "mlc.units", source, source + "\n", ("tests/test_units.py",))
    for _ in range(2):
        verdicts = run.judged({"harmless": same}, 1, said.append)
        assert verdicts["harmless"].kind == "survived"
    assert len(said) == 2
    assert run.score(verdicts) == 0.0 and "0 of 1 faults killed" in run.report(verdicts)


@pytest.mark.slow
def test_the_tests_kill_nearly_all_faults() -> None:
    verdicts = run.judged(FAULTS, 2, lambda line: None)
    assert run.score(verdicts) >= run.LEAST, run.report(verdicts)


def test_tests_that_fail_anyway_or_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[SAMPLE[0]]
    monkeypatch.setattr(run, "_apart", lambda fault, tests: {"status": 1})
    with pytest.raises(run.Unsound):
        run.sound([fault], {})
    monkeypatch.setattr(run, "_apart", lambda fault, tests: None)
    assert run.judge(fault).kind == "killed"
