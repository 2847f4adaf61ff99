"""Graphs of two, three and four levels, against the plain functional unroll in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mlc
from tests.training.problems import Problem, Unroll, Values, square

Outer = Callable[[Unroll], None]
K = 2


def hold(problem: Problem, levels: list[Any], outer: Outer, tops: tuple[str, ...], steps: int = 3) -> mlc.Training:
    """Parameters of every level after each outer step, and the top's gradients, equal the unroll's."""
    training, unroll = mlc.Training(levels), Unroll(problem)
    for _ in range(steps):
        unroll.begin(*tops)
        outer(unroll)
        training.run(1)
        for n, p in problem.params.items():
            torch.testing.assert_close(
                p.detach(), unroll.values[n].detach(), rtol=1e-9, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}"
            )
    return training


def step(u: Unroll, name: str) -> None:
    u.take(name, u.gradient(name))


def pull(p: Tensor, q: Tensor, b: Tensor) -> Tensor:
    """A loss of ``p`` that ``q`` shapes, neither linear nor quadratic."""
    return square(torch.tanh(b @ (p - q.sin()))) + 0.1 * (q.exp() * p * p).sum()


# ---- two levels


def bilevel() -> Problem:
    return Problem(
        w=lambda v, b: pull(v["w"], v["u"], b), u=lambda v, b: square(b @ v["w"] - 1) + 0.05 * square(v["u"])
    )


def bilevel_step(u: Unroll) -> None:
    u.train("w", K)
    step(u, "u")


def test_bilevel() -> None:
    p = bilevel()
    training = hold(p, [p.level("w", K), p.level("u")], bilevel_step, ("u",))
    assert training.program.metas


def test_the_gradient_is_that_of_a_loop_written_by_hand() -> None:
    p, q = bilevel(), bilevel()
    training = mlc.Training([p.level("w", K), p.level("u")])
    opt = torch.optim.SGD([q.params["w"]], lr=0.1)
    top = torch.optim.SGD([q.params["u"]], lr=0.1)

    @mlc.compile
    def outer_loss(batches: list[Tensor], val: Tensor) -> Tensor:
        for b in batches:
            opt.zero_grad()
            q.losses["w"](q.params, b).backward()
            opt.step()
        return q.losses["u"](q.params, val)

    for k in range(4):
        batches = [q.data["w"][(2 * k + i) % 5] for i in range(2)]
        top.zero_grad()
        outer_loss(batches, q.data["u"][k]).backward()
        top.step()
        training.run(1)
    for n in p.params:
        torch.testing.assert_close(p.params[n], q.params[n], rtol=1e-12, atol=1e-14)


# ---- three and four levels


def pipeline() -> Problem:
    """Bottom to top: each reads what the one below has trained, and the top enters the bottom."""
    return Problem(
        a=lambda v, b: pull(v["a"], v["t"], b),
        m=lambda v, b: pull(v["m"], v["a"], b),
        t=lambda v, b: square(b @ v["m"] - 1) + square(v["a"]),
    )


def pipeline_step(u: Unroll) -> None:
    u.train("a", K)
    u.train("m", 3)
    step(u, "t")


@pytest.mark.parametrize("order", ["amt", "mat"])
def test_pipeline_whatever_the_order_of_the_lower_ones(order: str) -> None:
    p = pipeline()
    levels = {"a": p.level("a", K), "m": p.level("m", 3), "t": p.level("t")}
    hold(p, [levels[n] for n in order], pipeline_step, ("t",))


def test_top_down_chain_is_not_zero() -> None:
    """The top enters the middle alone, the middle's solution the bottom, the bottom's solution the top's loss."""
    p = Problem(
        bottom=lambda v, b: pull(v["bottom"], v["middle"], b),
        middle=lambda v, b: pull(v["middle"], v["top"], b),
        top=lambda v, b: square(b @ v["bottom"] - 1),
    )

    def outer(u: Unroll) -> None:
        u.train("middle", K)
        u.train("bottom", K)
        step(u, "top")

    hold(p, [p.level("bottom", K), p.level("middle", K), p.level("top")], outer, ("top",))
    assert p.params["top"].grad is not None
    assert p.params["top"].grad.abs().max() > 1e-4


def test_chain_of_four() -> None:
    p = Problem(
        c=lambda v, b: pull(v["c"], v["m"], b),
        m=lambda v, b: pull(v["m"], v["a"], b),
        a=lambda v, b: pull(v["a"], v["t"], b),
        t=lambda v, b: square(b @ v["c"] - 1),
    )

    def outer(u: Unroll) -> None:
        for n in "amc":
            u.train(n, 2)
        step(u, "t")

    hold(p, [p.level("c", 2), p.level("m", 2), p.level("a", 2), p.level("t")], outer, ("t",), steps=2)


def test_nested_three_levels() -> None:
    """The middle's gradient goes through the bottom's training, the top's through both."""
    p = Problem(
        w=lambda v, b: pull(v["w"], v["u"], b) + 0.1 * (v["w"] * v["t"]).sum(),
        u=lambda v, b: square(b @ v["w"] - 1) + 0.1 * (v["u"] ** 2 * v["t"]).sum(),
        t=lambda v, b: square(b @ (v["w"] - v["u"])),
    )

    def outer(u: Unroll) -> None:
        for _ in range(2):
            u.mark("u")
            u.train("w", K)
            step(u, "u")
        step(u, "t")

    hold(p, [p.level("w", K), p.level("u", 2), p.level("t")], outer, ("t",))


def test_two_paths_from_one_parameter() -> None:
    p = Problem(
        a=lambda v, b: pull(v["a"], v["t"], b),
        m=lambda v, b: pull(v["m"], v["t"] + v["a"], b),
        t=lambda v, b: square(b @ (v["m"] * v["a"]) - 1) + square(v["t"]),
    )

    def outer(u: Unroll) -> None:
        u.train("a", K)
        u.train("m", K)
        step(u, "t")

    hold(p, [p.level("a", K), p.level("m", K), p.level("t")], outer, ("t",))


def test_two_lower_levels_for_one_upper() -> None:
    p = Problem(
        a=lambda v, b: pull(v["a"], v["t"], b),
        m=lambda v, b: pull(v["m"], v["t"].cos(), b),
        t=lambda v, b: square(b @ (v["m"] + v["a"]) - 1),
    )

    def outer(u: Unroll) -> None:
        u.train("a", 1)
        u.train("m", 3)
        step(u, "t")

    hold(p, [p.level("a", 1), p.level("m", 3), p.level("t")], outer, ("t",))


def two_uppers() -> Problem:
    return Problem(
        w=lambda v, b: pull(v["w"], v["s"], b) + pull(v["w"], v["t"].cos(), b),
        s=lambda v, b: square(b @ v["w"] - 1) + square(v["s"]),
        t=lambda v, b: square(b @ v["w"] + 1),
    )


def test_two_uppers_stand_side_by_side() -> None:
    def outer(u: Unroll) -> None:
        u.train("w", K)
        gradients = [(n, u.gradient(n)) for n in ("s", "t")]
        for n, g in gradients:
            u.take(n, g)

    p = two_uppers()
    training = hold(p, [p.level("w", K), p.level("s"), p.level("t")], outer, ("s", "t"))
    assert str(training).splitlines()[-1].endswith("at once")


def test_one_upper_anticipates_the_other_where_it_reads_it() -> None:
    p = two_uppers()
    first = p.losses["t"]
    p.losses["t"] = lambda v, b: first(v, b) + square(b @ v["s"])

    def outer(u: Unroll) -> None:
        u.mark("s")
        u.train("w", K)
        step(u, "s")
        step(u, "t")

    hold(p, [p.level("w", K), p.level("s"), p.level("t")], outer, ("s", "t"), steps=2)


def test_a_level_that_the_top_does_not_enter_is_trained_before() -> None:
    p = Problem(
        a=lambda v, b: square(b @ v["a"] - 1),
        w=lambda v, b: pull(v["w"], v["t"] + v["a"], b),
        t=lambda v, b: square(b @ v["w"] - 1),
    )

    def outer(u: Unroll) -> None:
        u.train("a", 2)
        u.train("w", K)
        u.values["a"] = u.values["a"].detach()
        step(u, "t")

    hold(p, [p.level("a", 2), p.level("w", K), p.level("t")], outer, ("t",))


# ---- games


def game() -> Problem:
    def x_loss(v: Values, b: Tensor) -> Tensor:
        return square(torch.tanh(b @ v["x"])) + (v["x"] * v["y"]).sum() + 0.3 * square(v["x"] - v["y"] ** 2)

    return Problem(x=x_loss, y=lambda v, b: square(b @ v["y"] - 1) - (v["x"] * v["y"]).sum())


def test_simultaneous_game() -> None:
    def outer(u: Unroll) -> None:
        g = {n: u.gradient(n) for n in "xy"}
        for n in "xy":
            u.take(n, g[n])

    p = game()
    hold(p, [mlc.Simultaneous(p.level("x"), p.level("y"))], outer, ("x", "y"))


def test_alternating_game() -> None:
    def outer(u: Unroll) -> None:
        for n in "xxxy":
            u.values = {k: v.detach() for k, v in u.values.items()}
            u.values[n].requires_grad_()
            step(u, n)

    p = game()
    hold(p, [mlc.Alternating(p.level("x", 3), p.level("y"))], outer, ("x",))


def test_a_list_of_two_is_a_leader_and_a_follower() -> None:
    def outer(u: Unroll) -> None:
        u.train("x", K)
        step(u, "y")

    p = game()
    hold(p, [p.level("x", K), p.level("y")], outer, ("y",))


@pytest.mark.parametrize("kind", [mlc.Simultaneous, mlc.Alternating])
def test_game_below_a_top_that_is_differentiated_through(kind: type) -> None:
    p = game()
    x_loss, y_loss = p.losses["x"], p.losses["y"]
    q = Problem(
        x=lambda v, b: x_loss(v, b) + (v["t"] * v["x"]).sum(),
        y=lambda v, b: y_loss(v, b) + square(v["t"] - v["y"]),
        t=lambda v, b: square(b @ (v["x"] + v["y"])),
    )

    def partial(u: Unroll, n: str) -> Tensor:
        """With the others held, but on the way of the top's gradient."""
        u.mark(n)
        own = u.values[n]
        (found,) = torch.autograd.grad(q.losses[n]({**u.values, n: own}, next(u.batches[n])), own, create_graph=True)
        return found

    def outer(u: Unroll) -> None:
        if kind is mlc.Simultaneous:
            for _ in range(2):
                g = {n: partial(u, n) for n in "xy"}
                for n in "xy":
                    u.take(n, g[n])
        else:
            for n in "xxyy":
                u.take(n, partial(u, n))
        step(u, "t")

    hold(q, [kind(q.level("x", 2), q.level("y", 2)), q.level("t")], outer, ("t",), steps=2)
