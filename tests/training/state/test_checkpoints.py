"""Folders of checkpoints: written to, thinned out, and agreed on by several processes."""

import json
import threading
from pathlib import Path

import pytest

import mlc
from mlc.training.state.archive import Frozen
from mlc.training.state.checkpoints import Checkpoints, Place


class Table:
    """Processes in threads, that tell each other texts."""

    def __init__(self, n: int) -> None:
        self.said: list[str] = [""] * n
        self.barrier = threading.Barrier(n, timeout=20)

    def seat(self, rank: int) -> Place:
        table = self

        class Talk:
            def told(self, text: str) -> list[str]:
                table.said[rank] = text
                table.barrier.wait()
                found = list(table.said)
                table.barrier.wait()
                return found

            def any(self, flag: bool) -> bool:
                return any(json.loads(t) for t in self.told(json.dumps(flag)))

        n = len(self.said)
        return Place(rank, n, tuple(range(n)), Talk())


def newest(folder: Path) -> list[int | str | None]:
    """What two processes find: the step, None, or the error."""
    table, found = Table(2), [None, None]

    def look(rank: int) -> None:
        try:
            got = Checkpoints(folder, table.seat(rank)).newest()
            found[rank] = None if got is None else got[1]["step"]
        except mlc.TrainingError as e:
            found[rank] = str(e)

    threads = [threading.Thread(target=look, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return found


def put(folder: Path, rank: int, *steps: int) -> None:
    for k in steps:
        Checkpoints(folder, Place(rank, 2, (0, 1))).write(k, Frozen.of({"step": k}))


@pytest.mark.filterwarnings("ignore::mlc.MlcWarning")
def test_processes_go_on_at_the_newest_step_that_all_can_read(tmp_path: Path) -> None:
    assert newest(tmp_path) == [None, None]
    put(tmp_path, 0, 2)
    assert newest(tmp_path) == [None, None]  # the other was killed while it wrote its first
    put(tmp_path, 1, 2)
    put(tmp_path, 0, 4)
    assert newest(tmp_path) == [2, 2]
    put(tmp_path, 1, 4)
    assert newest(tmp_path) == [4, 4]
    (tmp_path / "step-0000000004.rank-1-of-2.mlc").write_text("cut")
    assert newest(tmp_path) == [2, 2]
    (tmp_path / "step-0000000002.rank-1-of-2.mlc").unlink()
    zero, one = newest(tmp_path)
    assert "no checkpoint in" in str(zero) and "can be read" in str(one)


def test_a_world_of_another_size_is_refused(tmp_path: Path) -> None:
    put(tmp_path, 0, 2)
    with pytest.raises(mlc.TrainingError, match="are of 2 processes, and this training runs on 1"):
        Checkpoints(tmp_path).newest()


def test_files_go_only_when_every_process_has_newer_ones(tmp_path: Path) -> None:
    put(tmp_path, 1, 1, 2)
    put(tmp_path, 0, 1, 2, 3, 4, 5)
    left = [k for k, _ in Checkpoints(tmp_path, Place(0, 2, (0, 1))).files()]
    assert left == [1, 2, 3, 4, 5]
    put(tmp_path, 1, 3, 4, 5)
    put(tmp_path, 0, 6)
    assert [k for k, _ in Checkpoints(tmp_path, Place(0, 2, (0, 1))).files()] == [3, 4, 5, 6]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(mlc.TrainingError, match="cannot be written to: Not a directory"):
        Checkpoints(tmp_path / "file" / "run")

    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(mlc.TrainingError, match="cannot be written to: Permission denied\n  try: another folder"):
        Checkpoints(tmp_path)
