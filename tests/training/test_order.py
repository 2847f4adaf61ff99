"""The order that is found, and what is refused: every message names the user's level and its line."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlc
from tests.training.problems import Problem, square
from tests.training.test_graphs import bilevel, pipeline, pull, two_uppers

SGD = torch.optim.SGD


def lines(levels: list[Any]) -> list[str]:
    return [" ".join(line.split("(")[0].rstrip() for line in [row]) for row in str(mlc.Training(levels)).splitlines()]


def test_pipeline_runs_in_the_order_of_reading() -> None:
    p = pipeline()
    assert lines([p.level("m"), p.level("a"), p.level("t")]) == ["  a", "  m", "t"]


def test_three_uppers_stand_side_by_side() -> None:
    p = two_uppers()
    q = Problem(
        w=lambda v, b: p.losses["w"](v, b) + (v["r"] * v["w"]).sum(),
        r=lambda v, b: square(b @ v["w"]),
        s=p.losses["s"],
        t=p.losses["t"],
    )
    training = mlc.Training([q.level("w"), q.level("r"), q.level("s"), q.level("t")])
    assert [h.name for h in training.blocks[-1].heads] == ["r", "s", "t"]
    assert [x.name for x in training.blocks[-1].inner()] == ["w"]


def test_a_response_puts_an_upper_level_below() -> None:
    p = two_uppers()
    training = mlc.Training([p.level("w"), p.level("s", response=object()), p.level("t")])
    assert [h.name for h in training.blocks[-1].heads] == ["t"]


def test_a_detached_read_orders_but_carries_nothing() -> None:
    """A teacher whose solution is read as a constant is trained before; nothing goes back to it."""
    p = Problem(
        teacher=lambda v, b: square(b @ v["teacher"] - 1),
        w=lambda v, b: pull(v["w"], v["u"], b) + square(v["w"] - v["teacher"].detach()),
        u=lambda v, b: square(b @ v["w"]),
    )
    assert lines([p.level("teacher"), p.level("w"), p.level("u")]) == ["teacher", "  w", "u"]


def test_finding_out_changes_nothing() -> None:
    net, log = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()), []
    u = nn.Parameter(torch.zeros(3))

    def inner(b: Tensor) -> Tensor:
        log.append(1)
        return net(b + u).square().mean()

    data = [torch.randn(4, 3)]
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    mlc.Training(
        [
            mlc.Level("inner", net, SGD(net.parameters(), 0.1), inner, data),
            mlc.Level("outer", u, SGD([u], 0.1), lambda b: net(b).mean(), data),
        ]
    )
    assert not log
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(q.grad is None for q in net.parameters())


# ---- refusals


def refused(match: str, make: Any, line: bool = True) -> mlc.TrainingError:
    with pytest.raises(mlc.TrainingError, match=match) as e:
        make()
    if line:
        assert "test_order.py" in str(e.value) or "problems.py" in str(e.value), str(e.value)
        assert "try: " in str(e.value)
    return e.value


def test_a_level_that_nobody_reads() -> None:
    p = Problem(**bilevel().losses, x=lambda v, b: square(b @ v["x"]))
    refused("level 'x': nobody reads it", lambda: mlc.Training([p.level("w"), p.level("x"), p.level("u")]))


def test_the_top_in_the_wrong_place() -> None:
    p = two_uppers()
    refused("level 't': its loss does not depend on its parameters", lambda: mlc.Training([p.level("t"), p.level("w")]))


def test_a_cycle_that_has_no_order() -> None:
    p = bilevel()
    w = p.level("w")
    refused("level 'w': it stands in the list twice", lambda: mlc.Training([w, p.level("u"), w]))


def test_a_parameter_trained_by_two_levels() -> None:
    p = bilevel()
    both = [p.params["w"], p.params["u"]]
    u = mlc.Level("u", both, SGD(both, 0.1), lambda b: square(b @ p.params["w"]), p.data["u"])
    refused(
        r"level 'u': a tensor of shape \(3,\) is trained by level 'w' as well", lambda: mlc.Training([p.level("w"), u])
    )


def test_names() -> None:
    p = bilevel()
    refused("level 'w': another level has the same name", lambda: mlc.Training([p.level("w"), p.level("w")]))
    refused("name of a level is ''", lambda: mlc.Level("", p.params["w"], SGD([p.params["w"]], 0.1), square))


@pytest.mark.parametrize("levels", [[], None, 3, ["w"]])
def test_no_levels(levels: Any) -> None:
    refused("levels", lambda: mlc.Training(levels), line=False)


def test_a_list_in_the_list() -> None:
    p = bilevel()
    refused("a list of levels inside", lambda: mlc.Training([[p.level("w"), p.level("u")]]), line=False)
    refused("Alternating of a list", lambda: mlc.Alternating([p.level("w"), p.level("u")]), line=False)  # type: ignore[arg-type]
    refused("Simultaneous of 1 levels", lambda: mlc.Simultaneous(p.level("w")), line=False)


def test_responses_that_cannot_apply() -> None:
    p = bilevel()
    refused("level 'u': a response cannot apply", lambda: mlc.Training([p.level("w"), p.level("u", response=object())]))


def test_options_where_they_mean_nothing() -> None:
    p = bilevel()
    refused("level 'u': steps=2 of a level at the top", lambda: mlc.Training([p.level("w"), p.level("u", 2)]))
    refused("level 'u': a cold start", lambda: mlc.Training([p.level("w"), p.level("u", start="cold")]))
    refused(
        "level 'u': rollback of a level that has levels below",
        lambda: mlc.Training([p.level("w"), p.level("u", rollback=True)]),
    )
    q = Problem(x=lambda v, b: square(v["x"] - v["y"]), y=lambda v, b: square(v["y"] + v["x"]))
    refused("need equal steps", lambda: mlc.Training([mlc.Simultaneous(q.level("x", 2), q.level("y"))]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"start": "hot"}, "start='hot'"),
        ({"rollback": 1}, "rollback=1"),
        ({"start": "cold", "rollback": True}, "exclude each other"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"clip": 0}, "clip=0"),
        ({"clip": "norm"}, "clip='norm'"),
        ({"clip": float("nan")}, "clip=nan"),
        ({"scheduler": 3}, "scheduler is a int"),
        ({"scheduler": lambda o: 3}, "scheduler function returned a int"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau"),
        ({"response": "cg"}, "response='cg'"),
        ({"response": Problem}, "response=Problem"),
        ({"optimizer": 3}, "optimizer is a int"),
        ({"optimizer": lambda p: 3}, "optimizer function returned a int"),
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, "LBFGS"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    refused(f"level 'w': .*{said}", lambda: bilevel().level("w", **options))


def test_optimizers_over_other_parameters() -> None:
    p = bilevel()
    w, u = p.params["w"], p.params["u"]
    refused(
        "level 'w': .* is in its optimizer, but not in its params", lambda: p.level("w", optimizer=SGD([w, u], 0.1))
    )
    refused("level 'w': .* is not in its optimizer", lambda: p.level("w", optimizer=SGD([u], 0.1)))


def test_scheduler_of_another_optimizer() -> None:
    p = bilevel()
    other = torch.optim.lr_scheduler.StepLR(SGD([p.params["u"]], 0.1), 3)
    refused("level 'w': its scheduler belongs to another optimizer", lambda: p.level("w", scheduler=other))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ([], "has no params"),
        (None, "params are None"),
        ("w", "params are a str"),
        ([torch.ones(2)], "none of its params requires grad"),
        ([nn.Parameter(torch.ones(2)) * 2], "computed from other tensors"),
        (list(nn.Linear(2, 2).named_parameters()), "pairs of names"),
        ([3], "no tensor"),
    ],
)
def test_params_that_cannot_be_trained(params: Any, said: str) -> None:
    refused(f"level 'w': .*{said}", lambda: mlc.Level("w", params, SGD, square))


def test_frozen_parts_of_a_module_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    assert len(mlc.Level("w", net, SGD(net.parameters(), 0.1), square, [1]).params) == 2


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (3, "loss is a int"),
        (lambda x, y: x, r"takes more than a batch: \(x, y\)"),
        (lambda: torch.ones(()), "has data, but its loss takes no batch"),
    ],
)
def test_losses_that_do_not_fit(loss: Any, said: str) -> None:
    p = bilevel()
    refused(f"level 'w': .*{said}", lambda: mlc.Level("w", p.params["w"], SGD([p.params["w"]], 0.1), loss, p.data["w"]))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda x: x.sum().item(), "returned a float"),
        (lambda x: x * torch.ones(3), r"returned a tensor of shape \(3,\), no scalar"),
        (lambda x: (x.sum(), 1), "returned a tuple"),
        (lambda x: x.sum().detach(), "does not depend on its parameters"),
    ],
)
def test_losses_that_are_no_scalars(wrong: Any, said: str) -> None:
    p = bilevel()
    first = p.losses["w"]
    p.losses["w"] = lambda v, b: wrong(first(v, b))
    refused(f"level 'w': .*{said}", lambda: mlc.Training([p.level("w"), p.level("u")]))


def test_a_loss_that_raises_is_named() -> None:
    p = bilevel()
    p.losses["w"] = lambda v, b: (b @ torch.ones(5, dtype=torch.float64)).sum()
    with pytest.raises(RuntimeError) as e:
        mlc.Training([p.level("w"), p.level("u")])
    assert "level 'w'" in e.value.__notes__[0]


def test_a_tensor_computed_before_the_training() -> None:
    p = bilevel()
    shaped = p.params["u"].exp()
    p.losses["w"] = lambda v, b: square(b @ v["w"]) + (shaped * v["w"] ** 2).sum()
    said = refused(
        "level 'w': its loss reads .* computed from parameters of level 'u'",
        lambda: mlc.Training([p.level("w"), p.level("u")]),
    )
    assert "inside the loss" in said.advice


def test_a_loss_that_changes_its_batch() -> None:
    p = bilevel()
    first = p.losses["w"]
    p.losses["w"] = lambda v, b: first(v, b.mul_(0.9))
    refused(r"level 'w': its loss changes its batch, b", lambda: mlc.Training([p.level("w"), p.level("u")]))


def test_roll_back_too_far_below() -> None:
    p = Problem(
        w=lambda v, b: pull(v["w"], v["u"], b) + 0.1 * (v["w"] * v["t"]).sum(),
        u=lambda v, b: square(b @ v["w"] - 1) + 0.1 * (v["u"] ** 2 * v["t"]).sum(),
        t=lambda v, b: square(b @ (v["w"] - v["u"])),
    )
    refused("level 'w': rollback below 'u', which itself stands below 't'",
            lambda: mlc.Training([p.level("w", rollback=True), p.level("u"), p.level("t")]))  # fmt: skip


def test_callbacks_and_loggers() -> None:
    p = bilevel()
    levels = [p.level("w"), p.level("u")]
    refused("logger is a str", lambda: mlc.Training(levels, logger="csv"), line=False)
    refused("logger is CSV", lambda: mlc.Training(levels, logger=mlc.training.CSV), line=False)
    refused("callbacks contain", lambda: mlc.Training(levels, callbacks=[3]), line=False)  # type: ignore[list-item]
