"""The benchmarks run and leave the JSON they promise. Numbers are not judged here: machines are busy."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _browser

ROOT = Path(__file__).parents[1]


def quick(script: str, folder: Path) -> dict[str, Any]:
    out = folder / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    result = json.loads(out.read_text())
    known = {"device", "device_name", "cores", "threads", "torch", "python", "load_before"}
    assert result["machine"].keys() == known
    assert result["date"] and result["shape"]["layers"] == 1
    return result


def test_spine(tmp_path: Path) -> None:
    result = quick("spine.py", tmp_path)
    points = [(p["steps"], p["method"]) for p in result["points"]]
    assert points == [(1, "plain"), (1, "mlc"), (2, "plain"), (2, "mlc")]
    for p in result["points"]:
        assert p["peak_bytes"] >= 0 and p["parameter_bytes"] > 0
        assert p["seconds"] > 0 and p["cpu_seconds"] >= 0
        assert len(p["all_seconds"]) == len(p["all_peak_bytes"]) == 1
    assert [row["steps"] for row in result["ratios"]] == [1, 2]
    assert all(math.isfinite(row["gradient_error"]) for row in result["ratios"])
    assert result["growth_in_parameters"].keys() == {"plain", "mlc"}


def test_tracing(tmp_path: Path) -> None:
    result = quick("tracing.py", tmp_path)
    (point,) = result["points"]
    assert point["steps"] == 2
    assert point["seconds"].keys() == point["cpu_seconds"].keys() == {"trace", "plan", "lower", "generate"}
    assert math.isclose(point["total_seconds"], sum(point["seconds"].values()))
    assert point["equations"].keys() == {"forward", "backward"}


@pytest.mark.skipif(_browser.find() is None, reason="needs chromium and chromedriver")
def test_page(tmp_path: Path) -> None:
    pytest.importorskip("selenium")
    (point,) = quick("page.py", tmp_path)["points"]
    assert point["operators"] > 500 and point["shown"] < point["shown_expanded"]
    assert point["ready"] > 0 and point["bytes"] > 0
    assert point["seconds"].keys() == {"relayout", "search", "expand_all", "frame", "frame_far"}


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "benchmarks").glob("[!_]*.py")))
def test_make_bench_runs_only_scripts_with_help(script: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
