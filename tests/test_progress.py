"""Progress: shown on a terminal when work is long, silent otherwise."""

import io
import sys
import time

import pytest

from mlc import progress as module
from mlc.progress import progress
from mlc.view.plan import sweep
from tests import programs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("tracing") as say:
        say("iteration 1")
    assert capsys.readouterr() == ("", "")


def test_a_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    with progress("sweeping") as say:
        say("2 of 3")
        until = time.monotonic() + 30
        while "2 of 3" not in screen.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert "sweeping: 2 of 3" in screen.getvalue()


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(module, "PATIENCE", 1e6)
    with progress("tracing"):
        pass
    assert screen.getvalue().strip() == ""


@pytest.mark.slow
def test_a_sweep_says_where_it_is() -> None:
    said: list[str] = []
    assert sweep(programs.two_levels(), say=said.append)
    assert said[0].startswith("mixed, 1 of ") and len(said) >= int(said[0].rsplit(" ", 1)[1])
