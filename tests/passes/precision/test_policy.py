"""What `precision=` may be, and how it says what it may not."""

from typing import Any

import pytest
import torch

import mlc
from mlc.ir.lowered.precision import Resolved
from mlc.passes.precision.policy import resolve
from tests.passes.precision.training import data, model, sgd


@pytest.fixture(scope="module")
def program() -> mlc.Program:
    return mlc.trace(sgd, model(), *data())


@pytest.mark.parametrize("same", ["bf16", "bfloat16", torch.bfloat16, mlc.Precision(compute="bf16")])
def test_one_dtype_is_that_of_all_losses_and_products(program: mlc.Program, same: Any) -> None:
    assert resolve(program, same) == Resolved(compute={"L0": "bf16", "L1": "bf16"}, product={"L1": "bf16"})


def test_a_level_takes_its_product_along_unless_the_flow_is_named(program: mlc.Program) -> None:
    assert resolve(program, {"L1": "bf16"}).product == {"L1": "bf16"}
    assert resolve(program, {"L1": "bf16", "L1 -> L0": "float32"}) == Resolved(compute={"L1": "bf16"})
    assert resolve(program, {"L1 -> L0": "bf16"}) == Resolved(product={"L1": "bf16"})


def test_storage_by_kind(program: mlc.Program) -> None:
    assert resolve(program, mlc.Precision(store="int8")).store == {"L1": {"residuals": "int8"}}
    assert resolve(program, {"L1 -> L0": mlc.Precision(store={"states": "bf16"})}).store == {"L1": {"states": "bf16"}}
    assert not resolve(program, mlc.Precision(store="float32"))


@pytest.mark.parametrize(
    ("given", "what", "advice"),
    [
        ("float8", "compute='float8'", '"bf16"'),
        (3, "precision=3", "mlc.Precision"),
        ("fp16", "float16 loses second derivatives", '"bf16"'),
        ({"L1": "tf32"}, "tf32 is a setting of the device", "whole program"),
    ],
)
def test_what_is_no_policy_is_refused_at_once(given: Any, what: str, advice: str) -> None:
    with pytest.raises(mlc.PlanError, match="precision") as e:
        mlc.compile(sgd, precision=given)
    assert what in e.value.what and advice in e.value.advice


@pytest.mark.parametrize("kind", ["states", "gradients"])
def test_eight_bits_are_for_residuals(kind: str) -> None:
    with pytest.raises(mlc.PlanError, match="Adam divides by them"):
        mlc.Precision(store={kind: "int8"})
    with pytest.raises(mlc.PlanError, match="there are states, gradients, residuals"):
        mlc.Precision(store={"weights": "bf16"})


@pytest.mark.parametrize("name", ["L2", "L0 -> L1", "inner", "0.weight -> L1"])
def test_an_unknown_name_lists_those_that_exist(program: mlc.Program, name: str) -> None:
    with pytest.raises(mlc.PlanError, match="no level and no flow") as e:
        mlc.plan(program, precision={name: "bf16"})
    assert e.value.advice == "there are L0, L1, L1 -> L0"


def test_a_flow_has_no_update(program: mlc.Program) -> None:
    with pytest.raises(mlc.PlanError, match="a flow has no update"):
        mlc.plan(program, precision={"L1 -> L0": mlc.Precision(update="float64")})


def test_master_values_are_float32() -> None:
    f = mlc.compile(sgd, precision="bf16")
    with pytest.raises(mlc.PlanError, match="trains float64 values") as e:
        f(model(torch.float64), *data(torch.float64))
    assert e.value.loc is not None and "model.float()" in e.value.advice


def test_the_plan_holds_the_policy_and_older_plans_load(program: mlc.Program, tmp_path: Any) -> None:
    plan = mlc.plan(program, precision={"L1": "bf16"})
    plan.save(tmp_path / "plan.json")
    again = mlc.Plan.load(tmp_path / "plan.json", program)
    assert again == plan and again.precision == Resolved(compute={"L1": "bf16"}, product={"L1": "bf16"})
    old = mlc.plan(program).model_dump_json(exclude={"precision"})
    (tmp_path / "old.json").write_text(old)
    assert mlc.Plan.load(tmp_path / "old.json", program).precision is None
    (tmp_path / "bad.json").write_text(plan.model_dump_json().replace('"L1":"bf16"', '"L1":"bf17"'))
    with pytest.raises(mlc.PlanError, match="is no plan: precision"):
        mlc.Plan.load(tmp_path / "bad.json")


def test_explain_says_what_became_of_it(program: mlc.Program) -> None:
    text = mlc.plan(program, precision=mlc.Precision(compute="bf16", store="bf16")).explain()
    assert "2 of 2 matrix products" in " ".join(text.split()) and "saved by L1" in text
    assert "no effect on a CPU" in mlc.plan(program, precision="tf32").explain()
    assert "loss float32, product bf16" in mlc.plan(program, precision={"L1 -> L0": "bf16"}).explain()
