"""Writing beside the training: in order, one at a time, and what fails is raised where it is asked."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import mlc
from mlc.training.state.checkpoints import Checkpoints
from mlc.training.state.saver import Saver
from tests.training.test_resume import small


def test_the_caller_goes_on_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, go, sync = Saver(Checkpoints(tmp_path)), threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: (go.wait(10), sync(f)))
    x = torch.zeros(2)
    saver.save(1, {"step": 1, "x": x.clone()})
    assert saver.finished() == []
    assert not (tmp_path / "step-0000000001.mlc").exists()
    go.set()
    saver.save(2, {"step": 2})
    saver.wait()
    assert [k for k, _ in saver.finished()] == [1, 2]
    assert [k for k, _ in saver.checkpoints.files()] == [1, 2]


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_an_error_that_says_what_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes two files and not the third; the same program goes on when there is room."""
    training, _ = small()
    sync, left = os.fsync, [4]  # a file and its folder each

    def full(f: int) -> None:
        left[0] -= 1
        (no_room if left[0] < 0 else sync)(f)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(mlc.TrainingError, match=r"after step 6 could not be .* No space left .* after step 4 stands"):
        training.run(8, checkpoint=tmp_path, every=2)
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["step-0000000002.mlc", "step-0000000004.mlc"]
    monkeypatch.undo()
    again, _ = small()
    again.run(8, checkpoint=tmp_path, every=2)
    assert again.step == 8


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(event: Any) -> None:
        if event.kind == "step" and event.step == 2:
            raise ZeroDivisionError

    training, _ = small(callbacks=[fail])
    monkeypatch.setattr(os, "fsync", no_room)
    monkeypatch.setattr(Saver, "finished", lambda self: [])
    with pytest.raises(ZeroDivisionError) as e:
        training.run(4, checkpoint=tmp_path, every=1)
    assert any("No space left" in n for n in e.value.__notes__)
