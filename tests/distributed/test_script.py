"""The ``torchrun`` script of the examples gives the same result on any number of processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "ddp_reweighting.py"


def _losses(n: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(rf"^{n} process(?:es)?: validation loss ([0-9.]+) -> ([0-9.]+)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_one_and_two_processes_train_alike() -> None:
    one, two = _losses(1), _losses(2)
    assert abs(one[0] - two[0]) < 1e-9
    assert abs(one[1] - two[1]) < 1e-9
    assert one[1] < one[0]
