"""Files of states: everything that a state may hold comes back, and nothing that was changed or cut is taken."""

import collections
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mlc
from mlc.training import load_checkpoint
from mlc.training.state.archive import Frozen, read, write

STATE: dict[str, Any] = {
    "step": 3, "none": None, "yes": True, "big": 2**130, "float": 0.1, "inf": float("inf"), "text": "a\u00e4",
    "~": "a key of ours", "by number": {0: {"m": torch.arange(6.0).reshape(2, 3)}, (1, "x"): 2.5},
    "tuple": (1, (2, [3])), "set": {1, 2}, "bytes": b"\x00\xff", "complex": 1 - 2j, "dtype": torch.bfloat16,
    "device": torch.device("cpu"), "size": torch.Size([2, 3]), "counter": collections.Counter({5: 1, 8: 2}),
    "ordered": collections.OrderedDict(b=1, a=2), "array": np.arange(4, dtype=np.int32).reshape(2, 2),
    "scalar": np.float64(1.5), "bf16": torch.ones(3).bfloat16(), "bool": torch.tensor(True),
    "none of it": torch.empty(0, 4), "complex128": torch.tensor([1 + 2j], dtype=torch.complex128).conj(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "expanded": torch.ones(1).expand(3),
}  # fmt: skip


def written(state: dict[str, Any], path: Path) -> Path:
    with path.open("wb") as f:
        write(f, Frozen.of(state), {"step": 3})
    return path


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b) or isinstance(a, np.generic), (a, b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b)
        assert a.dtype == b.dtype
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for k in a:
            same(a[k], b[k])
    else:
        assert a == b


def test_everything_comes_back(tmp_path: Path) -> None:
    found = read(written(STATE, tmp_path / "x"))
    same(STATE, found)
    assert found["channels last"].stride() == STATE["channels last"].stride()


def test_no_pickle_is_in_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(written(STATE, tmp_path / "x")) as z:
        assert {n.partition("/")[0] for n in z.namelist()} == {"state.json", "tensors", "manifest.json"}


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    state = {"step": 1, "x": torch.arange(3.0), "t": ("a", 2)}
    path = written(state, tmp_path / "x")
    whole = path.read_bytes()
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="no whole checkpoint"):
            read(path)
    noticed = 0
    for n in range(len(whole)):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 16]) + whole[n + 1 :])
        try:
            same(state, read(path))  # a date in the zip, say: what is read is what was written
        except (ValueError, OSError):
            noticed += 1
    assert noticed > len(whole) / 2


class Odd:
    pass


def test_what_no_file_without_code_can_hold_is_named() -> None:
    with pytest.raises(mlc.TrainingError, match=r"state\['callbacks'\]\[0\]\['me'\] is a Odd"):
        Frozen.of({"callbacks": [{"me": Odd()}]})
    with pytest.raises(mlc.TrainingError, match="of layout torch"):
        Frozen.of({"x": torch.ones(2).to_sparse()})


def test_a_missing_file_and_another_file(tmp_path: Path) -> None:
    with pytest.raises(mlc.TrainingError, match="No such file"):
        load_checkpoint(tmp_path / "nothing")
    torch.save({"step": 1}, tmp_path / "torch.pt")
    with pytest.raises(mlc.TrainingError, match="no whole checkpoint"):
        load_checkpoint(tmp_path / "torch.pt")
    out = io.BytesIO()
    write(out, Frozen.of({"levels": 1}), {})
    (tmp_path / "other").write_bytes(out.getvalue())
    with pytest.raises(mlc.TrainingError, match="no state of a training"):
        load_checkpoint(tmp_path / "other")
