"""Killed trainings end as if nothing had happened; more of them: ``python -m tests.kills -n 200``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "ranks"), [(4, 1), (2, 2)])
def test_random_kills(kills: int, ranks: int, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kills", "-n", str(kills), "--ranks", str(ranks)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identical"]
    assert found["kills"] == kills
    assert found["survivors that ended by themselves"] == (kills if ranks == 2 else 0)
    assert not list(tmp_path.glob("kills-*"))
