"""SIGTERM: the step under way is finished and saved, and the process ends; a handler of the user's decides."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_resume import equal, small


def terminate(event: Any) -> None:
    if event.kind == "step" and event.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def test_it_saves_and_exits_and_the_next_process_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, wanted = small()
    whole.run(5)
    training, _ = small(callbacks=[terminate])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as e:
        training.run(5, checkpoint=tmp_path, every=100)
    assert e.value.code == 143
    assert "SIGTERM: the training is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert [f.name for f in tmp_path.iterdir()] == ["step-0000000002.mlc"]
    again, tensors = small()
    again.run(5, checkpoint=tmp_path, every=100)
    equal(tensors, wanted)


def test_a_handler_of_the_users_is_called_once_it_is_saved(tmp_path: Path) -> None:
    seen: list[Any] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append([f.name for f in tmp_path.iterdir()]))
    try:
        training, _ = small(callbacks=[terminate])
        training.run(3, checkpoint=tmp_path, every=100)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [["step-0000000002.mlc"]]
    assert training.step == 3
