"""What a recorded run says: memory, spans, traces, what notebooks show, and that nothing is recorded when off."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import mlc
from mlc.ir.types import with_overhead
from mlc.runtime.interpreter import recording
from mlc.view.modelexplorer import graphs_of
from mlc.view.page import content
from mlc.view.plan import Plan
from tests import programs

TRIPS = 3


@pytest.fixture
def ran() -> mlc.CompiledFunction:
    """A compiled function after a recorded call with its gradient."""

    @mlc.compile(flows="mixed")
    def loop(model, rate, batches, val):
        for x, y in batches:
            loss = (model(x).squeeze(1) - y).square().mean()
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= rate.exp() * g
        return (model(val[0]).squeeze(1) - val[1]).square().mean()

    rate = nn.Parameter(torch.tensor(-2.0))
    batches = [(torch.randn(64, 32), torch.randn(64)) for _ in range(TRIPS)]
    with mlc.recording():
        loop(nn.Linear(32, 1), rate, batches, batches[0]).backward()
    return loop


def test_stages_and_trips(ran: mlc.CompiledFunction) -> None:
    spans = ran.report.recorded.spans
    stages = [s for s in spans if not s.depth]
    assert [s.name for s in stages] == ["forward", "backward"]
    assert len([s for s in spans if s.depth == 1]) == 2 * TRIPS
    for trip in (s for s in spans if s.depth):
        assert any(stage.start <= trip.start <= trip.end <= stage.end for stage in stages)


def test_memory_is_what_operators_hold(ran: mlc.CompiledFunction) -> None:
    report = ran.report
    assert report.peak_bytes == max(s.bytes for s in report.recorded.samples) > 0
    for stage in ("forward", "backward"):
        shares = [s.share for s in report.recorded.samples if s.stage == stage]
        assert shares == sorted(shares) and shares[-1] == 1.0 and shares[0] > 0


def test_storages_are_counted_once_and_until_they_are_freed() -> None:
    def body(args: list[torch.Tensor]) -> list[torch.Tensor]:
        (x,) = args
        args.clear()
        y = x + 1  # 4000 bytes of its own
        z = y.view(10, 100)  # none
        del y
        w = z * 2  # 4000 more
        del z
        return [w.sum()]

    with recording.recording() as r:
        recording.each_stage(body, "forward")([torch.ones(1000)])
    one, total = with_overhead(4000, torch.device("cpu")), with_overhead(4, torch.device("cpu"))
    assert [s.bytes for s in r.samples] == [one, one, 2 * one, one + total]
    assert r.peak_bytes == 2 * one


def test_nothing_is_recorded_when_off(ran: mlc.CompiledFunction) -> None:
    assert recording.current() is None
    calls = []
    body = recording.each_trip(lambda args: calls.append(args) or [], "train")
    assert body([1]) == [] and calls == [[1]]


def test_trace_of_chrome(ran: mlc.CompiledFunction, tmp_path: Path) -> None:
    events = json.loads(ran.report.save_trace(tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {"mlc", "stages", "loops at depth 1 (L1)"}
    slices = [e for e in events if e["ph"] == "X"]
    assert {e["cat"] for e in slices} == {"stage", "trip"}
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in slices)
    counted = [e["args"]["bytes"] for e in events if e["ph"] == "C"]
    assert max(counted) == ran.report.peak_bytes


def test_trace_without_a_recording_has_the_stages(tmp_path: Path) -> None:
    fn = mlc.compile(lambda w: (w * w).sum())
    fn(torch.ones(3, requires_grad=True)).backward()
    events = json.loads(fn.report.save_trace(tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e["ph"] == "X"] == ["forward", "backward"]


# ---- shown


def test_notebooks_show_text_and_picture(ran: mlc.CompiledFunction) -> None:
    for x in (ran.program, ran.plan, ran.report):
        shown = x._repr_mimebundle_()
        assert shown["image/svg+xml"].startswith("<svg") and shown["text/plain"]
        frame = x.show(300)
        assert 'sandbox="allow-scripts"' in frame._repr_html_() and "<script" not in frame._repr_html_()
    assert "forward" in ran.report._repr_mimebundle_()["text/plain"]


def test_a_plan_without_its_program_has_no_picture(tmp_path: Path) -> None:
    mlc.plan(programs.two_levels()).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan._repr_mimebundle_().keys() == {"text/plain"}
    with pytest.raises(mlc.PlanError, match="no program to draw"):
        plan.show()


def test_measured_memory_is_on_the_page(ran: mlc.CompiledFunction) -> None:
    data = content(ran.program, ran.plan, ran.report.measured)
    assert data["measured"]["seconds"].keys() == {"forward", "backward"}
    assert max(m[2] for m in data["measured"]["memory"]) == ran.report.peak_bytes


def test_model_explorer(tmp_path: Path) -> None:
    plan = mlc.plan(programs.two_levels())
    path = mlc.draw(plan, tmp_path / "two.graph.json")
    found = json.loads(path.read_text())
    assert found == json.loads(json.dumps(graphs_of(content(plan.bound, plan))))
    assert [g["id"] for g in found["graphs"]] == ["levels", "forward", "backward"]
    for graph in found["graphs"]:
        ids = {n["id"] for n in graph["nodes"]}
        assert len(ids) == len(graph["nodes"])
        assert all(e["sourceNodeId"] in ids for n in graph["nodes"] for e in n["incomingEdges"])
    assert any(n["namespace"].endswith("L1/loss/model") for n in found["graphs"][0]["nodes"])
    notes = found["graphs"][0]["groupNodeAttributes"]
    assert notes["L0/L1"]["note"].startswith("Adam") and all(
        isinstance(x, str) for n in notes.values() for x in n.values()
    )
