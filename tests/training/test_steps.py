"""Options of levels against loops written by hand: the functional unroll in float64, or the loop under mlc.compile."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlc
from tests.training.problems import Problem, Unroll, square
from tests.training.test_graphs import K, bilevel, hold, pull, step


def by_hand(p: Problem, steps: int, loop: Any, opt: Any, outer: int = 3, top_loss: Any = None) -> None:
    """The top's steps over ``loop(batches, opt)``, an ordinary inner loop; the top descends with rate 0.1."""
    u = p.params["u"]

    @mlc.compile
    def outer_loss(batches: Any, val: Any) -> Tensor:
        loop(batches, opt)
        return p.losses["u"](p.params, val)

    source, val = itertools.cycle(p.data["w"]), itertools.cycle(p.data["u"])
    for _ in range(outer):
        loss = outer_loss([next(source) for _ in range(steps)], next(val))
        (g,) = torch.autograd.grad(loss, u)
        with torch.no_grad():
            u.sub_(0.1 * g)


def same(p: Problem, q: Problem) -> None:
    for n in p.params:
        torch.testing.assert_close(p.params[n], q.params[n], rtol=1e-9, atol=1e-12)


def test_accumulated_batches_are_one_step_on_their_mean() -> None:
    def outer(u: Unroll) -> None:
        for _ in range(K):
            u.mark("w")
            losses = [u.loss("w") for _ in range(3)]
            u.take("w", torch.autograd.grad(sum(losses) / 3, u.values["w"], create_graph=True)[0])  # type: ignore[arg-type]
        losses = [u.loss("u") for _ in range(2)]
        u.take("u", torch.autograd.grad(sum(losses) / 2, u.values["u"])[0])  # type: ignore[arg-type]

    p = bilevel()
    training = hold(p, [p.level("w", K, accumulate=3), p.level("u", accumulate=2)], outer, ("u",))
    values = training.run(1)
    assert set(values) == {"w", "u"}


def test_logged_losses_of_accumulated_batches_are_their_mean() -> None:
    p = bilevel()
    wanted = sum(p.losses["w"](p.params, b) for b in p.data["w"][:3]) / 3
    training = mlc.Training([p.level("w", 1, accumulate=3), p.level("u")])
    assert training.run(1)["w"] == pytest.approx(wanted.item(), rel=1e-12)  # type: ignore[union-attr]


def test_clipped_gradients_are_differentiated_as_they_are() -> None:
    p, q = bilevel(), bilevel()
    mlc.Training([p.level("w", 3, clip=0.05), p.level("u")]).run(3)

    def loop(batches: Any, opt: Any) -> None:
        for b in batches:
            opt.zero_grad()
            q.losses["w"](q.params, b).backward()
            nn.utils.clip_grad_norm_([q.params["w"]], 0.05)
            opt.step()

    by_hand(q, 3, loop, torch.optim.SGD([q.params["w"]], lr=0.1))
    same(p, q)


def test_clip_by_a_function_and_at_the_top() -> None:
    p, q = bilevel(), bilevel()

    def by_value(params: list[Tensor]) -> None:
        nn.utils.clip_grad_value_(params, 0.01)

    mlc.Training([p.level("w", 2), p.level("u", clip=by_value)]).run(1)
    mlc.Training([q.level("w", 2), q.level("u")]).run(1)
    hyper = q.params["u"].grad
    assert hyper is not None
    wanted = q.start["u"] - 0.1 * hyper.clamp(-0.01, 0.01)
    torch.testing.assert_close(p.params["u"].detach(), wanted, rtol=1e-12, atol=0)


def test_scheduler_of_a_lower_level_without_recording_every_step_anew() -> None:
    p, q = bilevel(), bilevel()
    opt = torch.optim.SGD([p.params["w"]], lr=0.2)
    training = mlc.Training(
        [
            p.level("w", 3, optimizer=opt, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
            p.level("u", scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 100)),
        ]
    )
    training.run(4)
    hand = torch.optim.SGD([q.params["w"]], lr=0.2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(hand, 0.9)

    def loop(batches: Any, opt: Any) -> None:
        for b in batches:
            opt.zero_grad()
            q.losses["w"](q.params, b).backward()
            opt.step()
            scheduler.step()

    by_hand(q, 3, loop, hand, outer=4)
    same(p, q)
    assert opt.param_groups[0]["lr"] == hand.param_groups[0]["lr"] == pytest.approx(0.2 * 0.9**12)
    assert training.recordings == 1


def test_a_scheduler_that_moves_more_than_the_rate_is_refused() -> None:
    p = bilevel()
    opt = torch.optim.SGD([p.params["w"]], lr=0.1, momentum=0.9)

    def cycle(o: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20)

    training = mlc.Training([p.level("w", 2, optimizer=opt, scheduler=cycle), p.level("u")])
    with pytest.raises(mlc.TrainingError, match="level 'w': its scheduler changes 'momentum'"):
        training.run(1)


def test_parameter_groups() -> None:
    p = Problem(w=lambda v, b: pull(v["w"] + v["x"], v["u"], b), x=lambda v, b: square(v["x"]), u=bilevel().losses["u"])
    q = Problem(w=p.losses["w"], x=p.losses["x"], u=p.losses["u"])
    groups = [{"params": [p.params["w"]], "lr": 0.2}, {"params": p.params["x"], "lr": 0.01}]
    inner = mlc.Level(
        "w", groups, lambda g: torch.optim.SGD(g, lr=1.0), lambda b: p.losses["w"](p.params, b), p.data["w"], 2
    )
    mlc.Training([inner, p.level("u")]).run(3)
    hand = torch.optim.SGD([{"params": [q.params["w"]], "lr": 0.2}, {"params": [q.params["x"]], "lr": 0.01}], lr=1.0)

    def loop(batches: Any, opt: Any) -> None:
        for b in batches:
            opt.zero_grad()
            q.losses["w"](q.params, b).backward()
            opt.step()

    by_hand(q, 2, loop, hand)
    same(p, q)


def test_cold_start_returns_to_the_beginning() -> None:
    p = bilevel()
    begin = p.start["w"]

    def outer(u: Unroll) -> None:
        u.values["w"] = begin.clone()
        u.train("w", K)
        step(u, "u")

    hold(p, [p.level("w", K, start="cold"), p.level("u")], outer, ("u",))


def test_cold_start_of_a_nested_level_forgets_its_optimizer_too() -> None:
    """Momentum, restarted twice within every step of the top."""
    p = Problem(
        w=lambda v, b: pull(v["w"], v["u"], b) + 0.1 * (v["w"] * v["t"]).sum(),
        u=lambda v, b: square(b @ v["w"] - 1) + 0.1 * (v["u"] ** 2 * v["t"]).sum(),
        t=lambda v, b: square(b @ (v["w"] - v["u"])),
    )

    def outer(u: Unroll) -> None:
        for _ in range(2):
            u.mark("u")
            u.values["w"] = p.start["w"].clone()
            velocity: Any = 0.0
            for _ in range(K):
                u.mark("w")
                velocity = 0.9 * velocity + u.gradient("w")
                u.take("w", velocity)
            step(u, "u")
        step(u, "t")

    opt = torch.optim.SGD([p.params["w"]], lr=0.1, momentum=0.9)
    training = hold(p, [p.level("w", K, optimizer=opt, start="cold"), p.level("u", 2), p.level("t")], outer, ("t",), 2)
    assert training.recordings <= 2


@pytest.mark.parametrize("steps", [1, 2])
def test_roll_back_takes_the_steps_again_with_the_new_parameters_above(steps: int) -> None:
    """DARTS (Liu et al. 2019, algorithm 1): the virtual step serves the hypergradient alone; momentum too."""
    p = bilevel()
    velocity = torch.zeros(3, dtype=torch.float64)

    def outer(u: Unroll) -> None:
        nonlocal velocity
        before, batches = u.values["w"], [next(u.batches["w"]) for _ in range(steps)]
        v = velocity
        for virtual in (True, False):
            u.values["w"], v = before, velocity
            for b in batches:
                u.mark("w")
                loss = p.losses["w"](u.values, b)
                v = 0.9 * v + torch.autograd.grad(loss, u.values["w"], create_graph=True)[0]
                u.take("w", v)
            if virtual:
                step(u, "u")
        velocity = v.detach()

    opt = torch.optim.SGD([p.params["w"]], lr=0.1, momentum=0.9)
    hold(p, [p.level("w", steps, optimizer=opt, rollback=True), p.level("u")], outer, ("u",))


def test_roll_back_leaves_running_statistics_as_if_there_had_been_no_virtual_step() -> None:
    torch.manual_seed(0)
    net, alpha = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), nn.Parameter(torch.zeros(3))
    data = [torch.randn(5, 3) for _ in range(3)]

    def inner(b: Tensor) -> Tensor:
        return net(b * alpha.exp()).square().mean()

    levels = [
        mlc.Level("w", net, lambda ps: torch.optim.SGD(ps, lr=0.1), inner, data, rollback=True),
        mlc.Level("alpha", alpha, torch.optim.SGD([alpha], lr=0.1), lambda b: net(b).mean(), data),
    ]
    mlc.Training(levels).run(2)
    count = net[1].num_batches_tracked
    assert isinstance(count, Tensor)
    assert int(count) == 2


def test_a_rate_that_another_level_trains() -> None:
    p = bilevel()
    rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    opt = torch.optim.SGD([p.params["w"]], lr=rate)
    levels = [
        p.level("w", 2, optimizer=opt),
        mlc.Level("rate", rate, torch.optim.SGD([rate], lr=0.01), lambda b: p.losses["u"](p.params, b), p.data["u"]),
    ]
    training = mlc.Training(levels)
    training.run(1)
    u = Unroll(p)
    eta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        u.mark("w")
        u.values["w"] = u.values["w"] - eta * u.gradient("w")
    (wanted,) = torch.autograd.grad(u.loss("u"), eta)
    torch.testing.assert_close(rate.grad, wanted, rtol=1e-9, atol=0)
    state = training.state_dict()
    training.load_state_dict(state)
    assert opt.param_groups[0]["lr"] is rate


def test_what_no_level_trains_is_constant_and_stays_as_it_was() -> None:
    backbone = nn.Linear(3, 3).double()
    p = bilevel()
    first = p.losses["w"]
    p.losses["w"] = lambda v, b: first(v, backbone(b))
    training = mlc.Training([p.level("w", 2), p.level("u")])
    training.run(2)
    assert [training.program.inputs[i].name.split(".")[-1] for i in training.program.metas] == ["u"]
    assert all(q.requires_grad and q.grad is None for q in backbone.parameters())


def test_levels_without_data() -> None:
    x, u = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(1.0))
    levels = [
        mlc.Level("x", x, torch.optim.SGD([x], lr=0.1), lambda: (x - u) ** 2, steps=2),
        mlc.Level("u", u, torch.optim.SGD([u], lr=0.1), lambda batch: (x - 2) ** 2),
    ]
    mlc.Training(levels).run(1)
    # x goes to x - 0.2 (x - u) twice: 0.64 * 3 + 0.36 u, so du = 2 (0.64 * 3 + 0.36 - 2) * 0.36
    torch.testing.assert_close(u.grad, torch.tensor(2 * (0.64 * 3 + 0.36 - 2) * 0.36))


def test_check_plan_and_program_before_the_first_step() -> None:
    p = bilevel()
    training = mlc.Training([p.level("w", 3), p.level("u")], memory="1MiB")
    before = {n: v.detach().clone() for n, v in p.params.items()}
    assert training.plan.memory == 2**20
    assert [x.depth for x in training.program.levels] == [0, 1]
    report = mlc.check(training.function, *training.arguments())
    assert report.ok, str(report)
    assert all(torch.equal(v, before[n]) for n, v in p.params.items())
    assert training.levels[0].feed.position == 0
    assert "with level('w'):" in training.source
