"""Offload as a lever: what is taken, what it is predicted to cost, when a plan for a GPU takes it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mlc
from mlc.ir.core import Loop, Region
from mlc.ir.digest import digest
from mlc.ir.lowered.contract import Levers
from mlc.ir.lowered.stages import Stages
from mlc.ir.parse import parse
from mlc.ir.program import Program
from mlc.ir.types import nbytes
from mlc.ir.verify import VerifyError, verify
from mlc.passes.cost import rates
from mlc.passes.cost.equations import Meter
from mlc.passes.cost.facts import stages_of
from mlc.passes.cost.timeline import predicted
from mlc.passes.planning import search
from mlc.passes.planning.planned import joint_of
from mlc.passes.remat.offload import LEAST, transfers
from mlc.view.curve import curve_csv, curve_table
from mlc.view.diff import changes, compare
from mlc.view.plan import Plan, make_plan, stages_for, sweep
from tests.ir.regions import loop_program
from tests.passes.finishing import finish
from tests.passes.planning.test_planner import loop
from tests.runtime.interpreter.test_host import problem

GPU = {
    "flops": {"2": 4e14, "4": 3e13, "8": 3e13}, "near": 2e12, "far": 2e12, "cache": 2**20,
    "special": {"2": 5e11, "4": 5e11, "8": 1e11}, "start": 4e-6, "strain": 1.0, "threads": 2,
}  # fmt: skip
Given = Callable[[float | None], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Given:
    """Plan as for a GPU whose link to the host has so many bytes per second."""

    def given(link: float | None) -> None:
        file = tmp_path / f"{link}.json"
        file.write_text(json.dumps({**GPU, "host": link}))
        monkeypatch.setenv("MLC_RATES", str(file))
        monkeypatch.setattr(search, "device_of", lambda region: torch.device("cuda", 0))
        rates._rates.cache_clear()

    yield given
    rates._rates.cache_clear()


@pytest.fixture(scope="module")
def program() -> Program:
    return mlc.trace(loop, *problem(24, width=512))


def lowered(program: Program, levers: Levers) -> Stages:
    return finish(joint_of(program, make_plan(program, flows="mixed")), levers)


def regions(stages: Stages) -> list[Region]:
    return [r for r in (stages.forward, stages.backward) if r is not None]


def hosted(stages: Stages) -> int:
    return sum(len(e.op.host) for r in regions(stages) for e in r.walk() if isinstance(e.op, Loop))


# ---- what is taken


def test_large_elements_are_taken_and_small_ones_stay(program: Program) -> None:
    assert hosted(lowered(program, Levers())) == 0
    every, large = lowered(program, Levers(offload=1)), lowered(program, Levers(offload=LEAST))
    assert 0 < hosted(large) < hosted(every)
    for e in large.forward.walk():
        if isinstance(e.op, Loop):
            outs = e.op.body.outputs[e.op.n_carry :]
            assert all(nbytes(outs[j].type) >= LEAST for j in e.op.host)
    assert hosted(lowered(program, Levers(offload=2**40))) == 0
    assert not any(e.op.host for r in regions(every) for e in r.eqns if isinstance(e.op, Loop) and e.tag == "adjoint")


def test_it_is_part_of_the_text_and_of_the_digest() -> None:
    plain = loop_program()

    def on_host(*emissions: int) -> Program:
        eqns = tuple(e.with_(op=replace(e.op, host=emissions)) if isinstance(e.op, Loop) else e
                     for e in plain.region.eqns)  # fmt: skip
        return replace(plain, region=Region(plain.region.inputs, eqns, plain.region.outputs, plain.region.names))

    p = on_host(0)
    verify(p.region)
    assert digest(parse(str(p))) == digest(p) != digest(plain)
    with pytest.raises(VerifyError, match=r"keeps \(1,\) of 1 emissions on the host"):
        verify(on_host(1).region)


def test_pictures_of_memory_leave_out_what_is_on_the_host(program: Program) -> None:
    for levers in (Levers(offload=LEAST), Levers(1e-9, 3, offload=LEAST)):
        stages = lowered(program, levers)
        points = predicted(stages_of(stages), stages)
        assert 0.5 * search.peak_bytes(stages) < max(p.total for x in points for p in x) <= search.peak_bytes(stages)


# ---- what it costs


def test_copies_cost_what_computing_does_not_hide(program: Program) -> None:
    stages = lowered(program, Levers(offload=LEAST))
    fast, slow, none = (
        transfers(regions(stages), Meter(rates.Rates.model_validate({**GPU, "host": link})))
        for link in (1e15, 1e8, None)
    )
    assert fast.bytes == slow.bytes > 24 * 512 * 512 * 8
    assert fast.seconds < 1e-6
    assert slow.seconds == pytest.approx(2 * slow.bytes / 1e8, rel=0.2)
    assert none.seconds == pytest.approx(2 * none.bytes / GPU["far"], rel=0.1)  # type: ignore[operator]
    assert transfers(regions(lowered(program, Levers())), Meter(torch.device("cpu"))).bytes == 0


# ---- when it is chosen


def test_a_plan_for_a_gpu_takes_it_where_that_is_faster_than_making_again(program: Program, gpu: Given) -> None:
    gpu(2.5e10)
    whole = mlc.plan(program, memory="4GiB")
    assert whole.offload is None and whole.host_bytes == 0
    plan = mlc.plan(program, memory=whole.peak_bytes // 3)
    assert plan.offload == LEAST and plan.host_bytes > 0 and plan.peak_bytes <= whole.peak_bytes // 3
    text = " ".join(plan.explain().split())
    assert "rest on the host" in text and "on the device:" in text
    gpu(None)
    other = mlc.plan(program, memory=whole.peak_bytes // 3)
    assert other.offload is None and other.seconds > plan.seconds


def test_over_a_slow_link_values_are_made_again(program: Program, gpu: Given) -> None:
    gpu(1e7)
    plan = mlc.plan(program, memory=mlc.plan(program, memory="4GiB").peak_bytes // 3)
    assert plan.offload is None
    forced = mlc.plan(program, memory="4GiB", levers={"offload": LEAST})
    assert forced.offload == LEAST and forced.seconds > plan.seconds
    found = next(d for d in forced.decisions if d.subject == "saved tensors")
    assert "more" in found.reason and "on the device" in found.runner_up


def test_hidden_copies_are_said_to_be(program: Program, gpu: Given) -> None:
    gpu(1e15)
    plan = mlc.plan(program, memory=mlc.plan(program, memory="4GiB").peak_bytes // 3)
    found = next(d for d in plan.decisions if d.subject == "saved tensors")
    assert found.choice.startswith("rest on the host: ") and found.reason == "copies hidden behind compute"
    assert found.bytes == plan.host_bytes


@pytest.mark.slow
def test_a_host_without_room_is_left_alone(program: Program, gpu: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(1e15)
    monkeypatch.setattr(search, "free_memory", lambda device: 2**20)
    assert mlc.plan(program, memory=mlc.plan(program, memory="4GiB").peak_bytes // 3).offload is None
    assert mlc.plan(program, memory="min").offload is None and all(p.offload is None for p in sweep(program))


def test_never_on_a_cpu(program: Program, gpu: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(1e15)
    monkeypatch.setattr(search, "device_of", lambda region: torch.device("cpu"))
    assert all(p.offload is None for p in sweep(program))
    assert mlc.plan(program, memory="min").offload is None


def test_a_sweep_for_a_gpu_shows_it(program: Program, gpu: Given) -> None:
    gpu(2.5e10)
    plans = sweep(program)
    assert {p.offload for p in plans} == {None, LEAST}
    assert "on the host" in curve_table(plans) and curve_csv(plans).splitlines()[0].endswith(",offload")


# ---- rates


def test_the_link_of_a_gpu_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where rates were kept before there was one; a CPU has none."""
    old = rates.Rates.model_validate(GPU)
    monkeypatch.delenv("MLC_RATES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "_title", lambda device, threads: device.type)
    monkeypatch.setattr(rates, "_measure", lambda device: old.model_copy(update={"host": 5e9}))
    (tmp_path / "mlc").mkdir()
    for kind in ("cuda", "cpu"):
        (tmp_path / "mlc" / f"rates-{kind}.json").write_text(old.model_dump_json())
        for _ in range(2):
            rates._rates.cache_clear()
            assert rates._rates(kind, 0, 1).host == (5e9 if kind == "cuda" else None)
            monkeypatch.setattr(rates, "_measure", lambda device: pytest.fail("measured again"))
        monkeypatch.setattr(rates, "_measure", lambda device: pytest.fail("measured"))
    rates._rates.cache_clear()
    assert rates._link(torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_gpu_has_a_link() -> None:
    assert 1e8 < (rates._link(torch.device("cuda", 0)) or 0) < 1e12


# ---- plan files


def test_a_plan_file_can_be_given_it_alone(tmp_path: Path) -> None:
    p = mlc.trace(loop, *problem(6))
    plan = mlc.plan(p, flows="mixed")
    data = json.loads(plan.model_dump_json())
    assert data["offload"] is None and data["host_bytes"] == 0
    (tmp_path / "plan.json").write_text(json.dumps({**data, "offload": 1024}))
    edited = Plan.load(tmp_path / "plan.json", p)
    assert hosted(stages_for(p, edited)) > 0
    assert changes(plan, edited)["settings"] == ["offload"]
    more = edited.model_copy(update={"host_bytes": 3 << 20})
    assert "on the host 0 B 3.0 MiB" in " ".join(compare(plan, more).split())
