"""Levels and flows of the loops people write."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlc
from mlc.ir.program import Flow, Program
from tests import programs


def flows(p: Program) -> list[str]:
    """Readable: `value weigh.weight -> L1 (loss)`, dead ones in brackets."""
    out = []
    for f in p.flows:
        text = f"{f.kind} {f.source} -> {f.target}" + (f" ({f.why})" if f.kind == "value" else "")
        out.append(text if f.carries or f.kind == "stop" else f"[{text}]")
    return out


def facts(p: Program, name: str) -> dict:
    level = asdict(p.level(name).level)
    return {k: level[k] for k in ("depth", "optimizer", "trips", "trains", "reads", "state")}


def stops(p: Program) -> list[Flow]:
    return [f for f in p.flows if f.kind == "stop"]


def test_two_levels() -> None:
    p = programs.two_levels()
    assert [x.name for x in p.levels] == ["L0", "L1"]
    metas = ("weigh.weight", "weigh.bias")
    assert facts(p, "L0") == {
        "depth": 0, "optimizer": "", "trips": 1, "trains": metas, "reads": (), "state": 0,
    }  # fmt: skip
    assert facts(p, "L1") == {
        "depth": 1, "optimizer": "Adam", "trips": None, "trains": ("model.weight", "model.bias"),
        "reads": metas, "state": 6,
    }  # fmt: skip
    assert flows(p) == [
        "gradient L1 -> L1",
        "value weigh.weight -> L1 (loss)",
        "value weigh.bias -> L1 (loss)",
        "response L1 -> L0",
    ]


def test_three_nested_levels_know_their_optimizers() -> None:
    p = programs.three_levels()
    assert not p.warnings  # the training is declared
    assert [(x.name, x.depth, x.optimizer) for x in p.levels] == [
        ("L0", 0, ""), ("L1", 1, "SGD"), ("L2", 2, "Adam"),
    ]  # fmt: skip
    assert facts(p, "L1")["trains"] == ("reg",)
    assert facts(p, "L1")["reads"] == ("meta",)
    assert facts(p, "L2")["trains"] == ("model.weight", "model.bias")
    assert facts(p, "L2")["reads"] == ()
    assert set(flows(p)) == {
        "gradient L1 -> L1",
        "gradient L2 -> L2",
        "value meta -> L1 (loss)",
        "value L1 -> L2 (trained above)",
        "response L2 -> L1",
        "response L2 -> L0",
    }


def test_maml_starts_from_its_meta_parameters() -> None:
    p = programs.maml()
    assert facts(p, "L1") == {
        "depth": 1, "optimizer": "SGD", "trips": 4, "trains": ("model.weight'", "model.bias'"),
        "reads": ("model.weight", "model.bias"), "state": 0,
    }  # fmt: skip
    assert flows(p) == [
        "gradient L1 -> L1",
        "value model.weight -> L1 (start)",
        "value model.bias -> L1 (start)",
        "response L1 -> L0",
    ]


def test_learned_rates_enter_the_update() -> None:
    p = programs.learned_rates()
    assert facts(p, "L1")["optimizer"] == "manual"
    assert facts(p, "L1")["reads"] == ("rate[0]", "rate[1]")
    assert [f for f in flows(p) if f.startswith("value")] == [
        "value rate[0] -> L1 (update)",
        "value rate[1] -> L1 (update)",
    ]


def test_a_stopped_path_is_a_flow_of_its_own_with_its_line() -> None:
    p = programs.one_path_stopped()
    assert [(f.source, f.target) for f in stops(p)] == [("weigh.weight", "L1"), ("weigh.bias", "L1")]
    assert all(f.loc is not None and "# the stop" in f.loc.source() for f in stops(p))
    assert "value weigh.weight -> L1 (loss)" in flows(p)  # the other path carries


def test_a_loop_without_gradients_has_one_level() -> None:
    p = programs.gradient_free()
    assert [x.name for x in p.levels] == ["L0"]
    assert flows(p) == ["value force -> L0 (loss)"]
    assert p.levels[0].reads == ("force",)


@pytest.mark.parametrize("name", programs.ALL)
def test_every_gradient_that_trains_belongs_to_one_level(name: str) -> None:
    p = programs.ALL[name]()
    places = [at for x in p.levels for at in x.at]
    assert len(places) == len(set(places))
    assert all(x.at for x in p.levels[1:])


def test_steps_by_hand_behind_a_detach_are_counted_with_the_first() -> None:
    def loop(model, strength, batches, val):
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            shift = torch.zeros_like(x, requires_grad=True)
            for _ in range(3):  # the first one stands before a loop of two
                (g,) = torch.autograd.grad(F.cross_entropy(model(x + shift), y), shift)
                shift = (shift + 0.1 * g).detach().requires_grad_()
            opt.zero_grad()
            F.cross_entropy(model(x + strength.sigmoid() * shift), y).backward()
            opt.step()
        return F.cross_entropy(model(val[0]), val[1])

    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(4)]
    program = mlc.trace(loop, nn.Linear(4, 3), nn.Parameter(torch.zeros(())), batches, batches[0])
    (attack,) = [x for x in program.levels if x.optimizer == "manual"]
    assert (attack.trips, attack.depth) == (3, 2) and len(attack.at) == 2


def test_a_flow_that_is_cut_carries_nothing() -> None:
    """Of two meta-parameters of a loss one enters detached: its flow is there, and its stop, but no derivative."""

    def cut(model, a, b, batches):
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in batches:
            opt.zero_grad()
            ((model(x) * a).sin() * b.detach()).sum().backward()
            opt.step()
        return model(batches[0]).sum()

    a, b = (nn.Parameter(torch.ones(())) for _ in range(2))
    p = mlc.trace(cut, nn.Linear(3, 1), a, b, [torch.rand(4, 3) for _ in range(3)])
    assert {"value a -> L1 (loss)", "[value b -> L1 (loss)]"} <= set(flows(p))
    assert [f.source for f in stops(p)] == ["b"]
