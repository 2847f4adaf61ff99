"""The command line, on files that a user could write."""

import gzip
import json
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import mlc
from mlc.cli.main import app

TEXT = """
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import mlc


@dataclass
class Val:
    x: torch.Tensor
    y: torch.Tensor


@mlc.compile
def validate(model, weigh, batches, val):
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        print("step")
        (torch.sigmoid(weigh(x))[:, 0] * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        opt.step()
    return F.cross_entropy(model(val.x), val.y)


@mlc.compile
def leaving(model, weigh, batches, val):
    loss = (weigh(val.x) * model(val.x)).mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    loss = (weigh(val.x) * model(val.x)).mean()
    loss.register_hook(lambda g: 2 * g)
    return loss


def example_args():
    torch.manual_seed(0)
    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(3)]
    return nn.Linear(4, 3), nn.Linear(4, 1), batches, Val(torch.randn(6, 4), torch.randint(3, (6,)))
"""

MAIN = """

def main():
    validate(*example_args()).backward()
    print("done")
    return {"answer": 42}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "loop.py"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def interpreter_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command imports a file as a script would; put back what that changes."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "modules", sys.modules)
    sys.modules.pop("loop", None)


def run(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_check(file: Path) -> None:
    assert run("check", file).stdout.startswith("mlc.check of validate: ok")
    found = json.loads(run("check", file, "--json").stdout)
    assert found["ok"]
    assert found["rel_err"] < 1e-7
    assert {m["name"] for m in found["meta_parameters"]} == {"weigh.weight", "weigh.bias"}
    assert run("check", file, "--float32").stdout.startswith("mlc.check of validate: ok")


def test_plan(file: Path, tmp_path: Path) -> None:
    printed = json.loads(run("plan", file).stdout)
    assert printed["version"] == 1
    path = tmp_path / "new" / "plan.json"
    result = run("plan", file, "-o", path)
    assert result.stdout == ""
    assert mlc.Plan.load(path).program == printed["program"]
    assert "L1" in run("plan", file, "--text").stdout
    assert "a plan is JSON" in run("plan", file, "-o", tmp_path / "plan.yaml", code=1).stderr


def test_plan_takes_a_budget(file: Path) -> None:
    assert json.loads(run("plan", file, "--memory", "2GiB").stdout)["version"] == 1
    assert "not a size" in run("plan", file, "--memory", "lots", code=1).stderr


def test_explain(file: Path) -> None:
    text = run("explain", file).stdout
    assert "validate" in text
    assert "SGD" in text
    assert json.loads(run("explain", file, "--json").stdout)["function"] == "validate"


def test_draw(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "loop.svg"
    run("draw", file, "-o", path)
    assert "<svg" in path.read_text()
    assert "cannot draw" in run("draw", file, "-o", tmp_path / "loop.xyz", code=1).stderr


def test_draw_by_dot(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz")
    path = tmp_path / "loop.svg"
    run("draw", file, "-o", path, "--layout", "dot")
    assert 'class="cluster"' in path.read_text()


def test_draw_measures_and_sweeps(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    run("draw", file, "-o", path, "--measure", "--sweep")
    data = json.loads(gzip.decompress(b64decode(re.search(r'id="data">([^<]*)<', path.read_text()).group(1))))
    assert data["measured"]["seconds"].keys() == {"forward", "backward"}
    assert {m[0] for m in data["measured"]["memory"]} == {"forward", "backward"}
    assert sum(p["chosen"] for p in data["curve"]) == 1
    assert "no place" in run("draw", file, "-o", tmp_path / "x.svg", "--measure", code=1).stderr


@pytest.mark.parametrize("ending", ["", MAIN])
def test_run_writes_a_trace(file: Path, tmp_path: Path, ending: str) -> None:
    file.write_text(TEXT + ending)
    path = tmp_path / "traces" / "out.json"
    assert "trace written" in run("run", file, "--trace", path).stderr
    events = json.loads(path.read_text())["traceEvents"]
    assert {e["name"] for e in events if e["ph"] == "X"} >= {"forward", "backward", "train"}
    assert max(e["args"]["bytes"] for e in events if e["ph"] == "C") > 0


def test_a_trace_of_nothing(file: Path, tmp_path: Path) -> None:
    file.write_text(TEXT + "\n\ndef main():\n    pass\n")
    assert "nothing was recorded" in run("run", file, "--trace", tmp_path / "out.json", code=1).stderr


def test_run_calls_the_function_without_main(file: Path) -> None:
    result = run("run", file)
    assert "output " in result.stdout
    assert "weigh.weight" in result.stdout
    found = json.loads(run("run", file, "--json").stdout)
    assert found["gradient_norms"]["weigh.weight"] > 0
    assert found["report"]["seconds"] > 0


def test_run_calls_main(file: Path) -> None:
    file.write_text(TEXT + MAIN)
    assert "done" in run("run", file).stdout
    result = run("run", file, "--json", "-v")
    assert json.loads(result.stdout)["result"] == {"answer": 42}
    assert "done" in result.stderr
    assert "output" in run("run", f"{file}:validate").stdout


def test_verbose_says_how_long_it_took(file: Path) -> None:
    assert "tracing: " in run("explain", file, "-v").stderr


def test_errors_name_the_line_of_the_user_and_exit_with_1(file: Path) -> None:
    result = run("check", f"{file}:leaving", code=1)
    line = TEXT.splitlines().index("    loss.register_hook(lambda g: 2 * g)") + 1
    assert f"loop.py:{line}" in result.stderr
    assert "try:" in result.stderr
    assert result.stdout == ""


def test_errors_of_the_file_itself(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import mlc\n1 / 0\n")
    result = run("check", broken, code=1)
    assert "ZeroDivisionError" in result.stderr
    assert "broken.py:2" in result.stderr
    broken.write_text("def f(:\n")
    assert "SyntaxError" in run("run", broken, code=1).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import mlc\n", "no compiled function"),
        ("import mlc\n@mlc.compile\ndef f(x):\n    return x\n", "no example_args()"),
        (
            "import mlc\n@mlc.compile\ndef f(x):\n    return x\ndef example_args():\n    return 3\n",
            "returns a int",
        ),
    ],
)
def test_files_that_do_not_follow_the_convention(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "other.py"
    path.write_text(text)
    result = run("plan", path, code=1)
    assert message in result.stderr
    assert "try:" in result.stderr


def test_names_that_are_not_there(file: Path, tmp_path: Path) -> None:
    result = run("plan", f"{file}:nothing", code=1)
    assert "validate, leaving" in result.stderr
    assert "no file" in run("plan", tmp_path / "nowhere.py", code=1).stderr


def test_debug_shows_the_traceback(file: Path) -> None:
    result = CliRunner().invoke(app, ["check", f"{file}:leaving", "--debug"])
    assert isinstance(result.exception, mlc.CaptureError)


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no benchmarks" in run("bench", code=1).stderr
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "quick.py").write_text("open('ran', 'w').close()\n")
    (tmp_path / "benchmarks" / "_shared.py").write_text("")
    assert run("bench").stdout.split() == ["quick"]
    assert "quick" in run("bench", "slow", code=1).stderr
    run("bench", "quick")
    assert (tmp_path / "ran").exists()


@pytest.mark.slow
def test_as_a_module_with_worker_processes(tmp_path: Path) -> None:
    """The file is found again by the processes of a DataLoader that are started afresh."""
    path = tmp_path / "workers.py"
    path.write_text(
        TEXT
        + """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.full((4,), float(i)), torch.tensor(i % 3)


def main():
    loader = torch.utils.data.DataLoader(Data(), 4, num_workers=1, multiprocessing_context="spawn")
    _, _, _, val = example_args()
    print("loss", float(validate(nn.Linear(4, 3), nn.Linear(4, 1), loader, val).detach()))
"""
    )
    command = [sys.executable, "-m", "mlc", "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout


def test_torch_is_left_alone(file: Path) -> None:
    run("check", file)
    assert torch.get_default_dtype() is torch.float32


# ---- looking inside


def test_explain_verbose_and_as_data(file: Path) -> None:
    text = run("explain", file, "-v").stdout
    assert "at the peak" in text and "weigh.weight, weigh.bias -> L1 (value: loss) -> L0" in text
    assert "at the peak" not in run("explain", file).stdout
    data = json.loads(run("explain", file, "--json").stdout)
    assert [x["name"] for x in data["levels"]] == ["L0", "L1"]
    line = TEXT[: TEXT.index(".backward()")].count("\n") + 1
    assert data["levels"][1]["line"] == line
    assert {f["kind"] for f in data["flows"]} == {"gradient", "value", "response"}
    assert all(f["choice"] and f["why"] for f in data["flows"])


def test_inspect(file: Path) -> None:
    text = run("inspect", file).stdout
    assert text.startswith("def forward(") and "def backward(" in text
    assert "kept" in text and "freed after" in text
    assert "def backward(" not in run("inspect", file, "--stage", "forward").stdout
    assert run("inspect", file, "--after", "trace").stdout.startswith("def program(")
    assert "grad(" in run("inspect", file, "--after", "trace").stdout
    changes = run("inspect", file, "--diff-passes").stdout
    assert "differentiate made joint of program" in changes and "cut made forward and backward of joint" in changes
    assert "no pass" in run("inspect", file, "--after", "nothing", code=1).stderr


def test_plans_are_compared(file: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    run("plan", file, "-o", a)
    run("plan", file, "-o", b, "--memory", "1GiB")
    assert "memory" in run("plan", "--diff", a, b).stdout
    assert json.loads(run("plan", "--diff", a, b, "--json").stdout)["settings"] == ["memory"]
    assert "equal" in run("plan", "--diff", a, a).stdout
    assert "nothing to plan" in run("plan", code=1).stderr


@pytest.mark.slow
def test_a_sweep_prints_the_curve_and_writes_it(file: Path, tmp_path: Path) -> None:
    written = tmp_path / "curve.csv"
    text = run("plan", file, "--sweep", "-o", written).stdout
    rows = written.read_text().splitlines()
    assert rows[0] == "seconds,peak_bytes,mode,backend,price,slots,parts,offload"
    points = [row.split(",") for row in rows[1:]]
    assert points and all(float(p[0]) > 0 and int(p[1]) >= 0 for p in points)
    assert [int(p[1]) for p in points] == sorted((int(p[1]) for p in points), reverse=True)
    assert len([x for x in text.splitlines() if "mixed" in x or "forward" in x]) == len(points)
    assert len(json.loads(run("plan", file, "--sweep", "--json").stdout)) == len(points)
    assert "curve is no .txt" in run("plan", file, "--sweep", "-o", tmp_path / "x.txt", code=1).output


LEVELS = """
import torch
from torch import nn

import mlc


def example_training():
    w, u = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    sgd, data = torch.optim.SGD, [torch.ones(2, 3)]
    inner = mlc.Level("inner", w, sgd([w], lr=0.1), lambda b: ((b @ (w - u)) ** 2).mean(), data, steps=2)
    return mlc.Training([inner, mlc.Level("outer", u, sgd([u], lr=0.1), lambda: (w - 2).square().sum())])
"""


def test_a_file_of_levels(tmp_path: Path) -> None:
    file = tmp_path / "levels.py"
    file.write_text(LEVELS)
    for command, said in (("explain", "plan for step_of_outer"), ("check", "step_of_outer: ok")):
        result = CliRunner().invoke(app, [command, str(file)])
        assert result.exit_code == 0, result.output
        assert said in result.output
    result = CliRunner().invoke(app, ["run", str(file), "--memory", "1B"])
    assert result.exit_code == 1 and "no plan fits 1 bytes" in result.output, result.output
    file.write_text(LEVELS.replace("return mlc.Training(", "return list("))
    result = CliRunner().invoke(app, ["plan", str(file)])
    assert result.exit_code != 0
    assert "returns a list" in result.output


MAIN_OF_LEVELS = """

def main():
    print("ran to", (t := example_training()).run(4) and t.step)
"""


def test_checkpoints_of_what_main_trains(tmp_path: Path) -> None:
    file, folder = tmp_path / "levels.py", tmp_path / "saved"
    file.write_text(LEVELS + MAIN_OF_LEVELS)
    args = ["run", str(file), "--checkpoint", str(folder), "--every", "2"]
    first = CliRunner().invoke(app, args)
    assert first.exit_code == 0, first.output
    assert sorted(f.name for f in folder.iterdir()) == ["step-0000000002.mlc", "step-0000000004.mlc"]
    (folder / "step-0000000004.mlc").unlink()
    again = CliRunner().invoke(app, args)
    assert "goes on from" in again.output and "after step 2" in again.output and "ran to 4" in again.output
    for text, more, said in ((LEVELS, [], "has no main()"), (LEVELS + "\ndef main(): ...\n", [], "nothing was saved")):
        file.write_text(text)
        found = CliRunner().invoke(app, [*args, *more])
        assert found.exit_code == 1 and said in found.output, found.output
    found = CliRunner().invoke(app, ["run", str(file), "--every", "2"])
    assert "--every without --checkpoint" in found.output
