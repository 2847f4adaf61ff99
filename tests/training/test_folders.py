"""Folders given from outside: one for each training, in the order in which they run."""

from pathlib import Path

from mlc.training.folders import checkpoints_in, given


def test_each_training_has_its_own(tmp_path: Path) -> None:
    one, two = object(), object()
    assert given(one, None, None) == (None, None)
    with checkpoints_in(tmp_path, 5) as found:
        assert given(one, None, None) == (tmp_path, 5)
        assert given(two, None, 3) == (tmp_path / "2", 3)
        assert given(one, None, None) == (tmp_path, 5)
        assert given(two, "own", None) == ("own", None)
    assert found.trainings == [one, two]
    assert given(one, None, None) == (None, None)
