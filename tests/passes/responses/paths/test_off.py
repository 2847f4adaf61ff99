"""Which paths can be switched off, and what is said of them."""

import pytest
import torch

import mlc
from mlc.ir.program import Program
from mlc.passes.responses.paths.off import cut_flows, decided_paths, switched_off
from tests.passes.responses.paths.levels import compiled, program, values


@pytest.fixture(scope="module")
def traced() -> Program:
    return mlc.trace(program, *values())


def test_names_patterns_and_later_entries(traced: Program) -> None:
    assert switched_off(traced, None, "all") == ()
    assert switched_off(traced, {"* -> L0": False, "b -> L0": True}, "all") == ("a -> L0",)
    assert switched_off(traced, {"* -> fine -> *": False}, "all") == ("a -> L2 -> L0", "b -> L2 -> L0")
    (decision,) = decided_paths(traced, ("a -> L1 -> L2 -> L0",))
    assert decision.choice == "off" and "from L1 to L2" in decision.reason
    assert cut_flows(traced, ("a -> L1 -> L2 -> L0", "a -> L1 -> L0")) == {("a", "L1"), ("L1", "L2"), ("L1", "L0")}


@pytest.mark.parametrize(
    ("paths", "stop", "message"),
    [
        ({"c -> L0": False}, "all", r"(?s)no path of this program.*there are a -> L0"),
        ({"*": False}, "all", "no path"),
        (["a -> L0"], "all", "paths="),
        ({"a -> L0": 0}, "all", "paths="),
        ({"* -> L0": False, "* -> * -> L0": False, "* -> * -> * -> L0": False}, "all", "switches every path off"),
        ({"a -> L0": False}, "inner", "stop_gradient"),
    ],
)
def test_what_makes_no_sense_is_refused(traced: Program, paths: object, stop: str, message: str) -> None:
    with pytest.raises(mlc.PlanError, match=message):
        switched_off(traced, paths, stop)  # type: ignore[arg-type]


def test_a_path_without_a_flow_of_its_own_is_refused() -> None:
    def two(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        opt = torch.optim.SGD([w], lr=0.1)
        for _ in range(2):
            opt.zero_grad()
            (a * b * w.square()).sum().backward()
            opt.step()
        v = (0 * w).detach().requires_grad_()
        opt = torch.optim.SGD([v], lr=0.1)
        with mlc.level("second"):
            for _ in range(2):
                opt.zero_grad()
                (v - w).square().sum().backward()
                opt.step()
        return (v + w).sum()

    w, _, a, b = values()
    with pytest.raises(mlc.PlanError, match=r"(?s)a -> L1 -> L0 cannot be.*shares its flows with.*stays on.*compile"):
        compiled(two, paths={"a -> L1 -> L0": False})(w, a, b)


def test_plans_hold_it_and_check_tells_the_distance() -> None:
    fn = compiled(paths={"a -> pre -> L0": False})
    fn(*values()).backward()
    assert fn.plan is not None and fn.plan.off == ("a -> L1 -> L0",)
    assert "[off]" in fn.plan.explain() and "path a -> L1 -> L0" in fn.plan.explain()
    assert mlc.Plan.model_validate_json(fn.plan.model_dump_json()) == fn.plan
    report = mlc.check(fn, *values())
    assert report.responses == ("path a -> L1 -> L0 switched off",) and 1e-4 < report.distance < 2
