"""Losses and updates of levels as graphs that run."""

import pytest
import torch
from torch import Tensor, fx

import mlc
from mlc.ir.core import Region
from mlc.ir.lowered import fx as ops
from mlc.ir.verify import verify
from tests import programs


def inputs(region: Region) -> list[Tensor]:
    """Random values for a region's inputs."""
    torch.manual_seed(1)
    return [torch.randn(v.type.shape).to(v.type.dtype) for v in region.inputs]


def named(graph: fx.GraphModule) -> list[str]:
    return [n.target for n in graph.graph.nodes if n.op == "placeholder"]


@pytest.mark.parametrize("name", programs.ALL)
def test_graphs_of_every_level_are_sound(name: str) -> None:
    p = programs.ALL[name]()
    for level in p.levels:
        view = p.level(level.name)
        assert view.level is level
        verify(view.loss_region)
        view.loss.graph.lint()
        if level.at:
            verify(view.update_region)
            view.update.graph.lint()


def test_a_loss_computes_the_users_loss() -> None:
    view = programs.one_path_stopped().level("L1")
    assert named(view.loss) == ["theta0", "theta1", "stopped0", "in3", "in4", "in5", "in6"]
    values = dict(zip(named(view.loss), inputs(view.loss_region), strict=True))
    (w, b, gate), rest = list(values.values())[:3], list(values.values())[3:]
    wx, wb, x, y = sorted(rest, key=lambda t: [(1, 4), (1,), (5, 4), (5,)].index(tuple(t.shape)))
    weigh, out = (x @ wx.T + wb).squeeze(1), (x @ w.T + b).squeeze(1)
    expected = (torch.sigmoid(weigh) * (out - y).square() + gate * out).mean()
    torch.testing.assert_close(view.loss(*values.values())[0], expected)


def test_an_update_computes_the_users_update() -> None:
    view = programs.learned_rates().level("L1")
    assert named(view.update)[:4] == ["grad0", "grad1", "theta0", "theta1"]
    g0, g1, w0, w1, *rates = inputs(view.update_region)
    r0, r1 = sorted(rates, key=lambda t: -t.dim())
    new = view.update(g0, g1, w0, w1, *rates)
    torch.testing.assert_close(new, (w0 - r0.exp() * g0, w1 - r1.exp() * g1))


def test_an_update_carries_optimizer_state() -> None:
    view = programs.two_levels().level("L1")
    assert len(view.update_region.outputs) == 2 + 6  # what is trained, a count and two moments each


def test_a_level_within_a_loss_is_a_loop_with_a_gradient_in_it() -> None:
    view = programs.three_levels().level("L1")
    calls = [n for n in view.loss.graph.nodes if n.op == "call_function"]
    loop = next(n for n in calls if n.target is ops.loop)
    body = getattr(view.loss, loop.args[0].target)
    assert any(n.target is ops.grad for n in body.graph.nodes)
    assert loop.meta["loc"].file == programs.__file__
    shapes = {tuple(n.meta["val"].shape) for n in calls if "val" in n.meta}
    assert () in shapes


def test_the_loss_of_the_result_runs_the_whole_program() -> None:
    view = programs.gradient_free().level("L0")
    values = dict(zip(named(view.loss), [t.requires_grad_() for t in inputs(view.loss_region)], strict=True))
    (out,) = view.loss(*values.values())
    force, x, v = (values[n] for n in ("force", "start_0", "start_1"))
    for _ in range(6):
        v = v - 0.1 * torch.tanh(x * force)
        x = x + 0.1 * v
    torch.testing.assert_close(out, x.square().mean())
    torch.testing.assert_close(torch.autograd.grad(out, force), torch.autograd.grad(x.square().mean(), force))


def test_three_levels_run_and_differentiate() -> None:
    """The graph of a loss with an inner level in it has the gradient of the loop written out."""

    def loop(w, lam, target):
        for _ in range(3):
            (g,) = torch.autograd.grad(((w - target).square() * lam.exp()).sum(), w, create_graph=True)
            w = w - 0.1 * g
        return (w - 1).square().sum()

    w, target = torch.zeros(3).requires_grad_(), torch.randn(3)
    lam = torch.zeros(3).requires_grad_()
    view = mlc.trace(loop, w, lam, target).level("L0")
    values = {"w": w, "lam": lam, "target": target}
    (out,) = view.loss(*[values[n] for n in named(view.loss)])
    expected = loop(w, lam, target)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, lam), torch.autograd.grad(expected, lam))


def test_a_custom_function_keeps_its_rule() -> None:
    view = programs.custom().level("L1")
    values = [t.requires_grad_() for t in inputs(view.loss_region)]
    (out,) = view.loss(*values)
    (g,) = torch.autograd.grad(out, values[0])
    assert g.shape == values[0].shape
    assert g.abs().sum() > 0


def test_what_draws_needs_the_runtime() -> None:
    view = programs.noisy().level("L0")
    with pytest.raises(NotImplementedError, match="belongs to the runtime"):
        view.loss(*inputs(view.loss_region))


def test_the_outermost_level_has_no_update() -> None:
    with pytest.raises(mlc.VerifyError, match="L0 has no update"):
        _ = programs.two_levels().level("L0").update


def test_the_root_of_zero_has_derivative_zero() -> None:
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    (g,) = torch.autograd.grad(ops.safesqrt(x).sum(), x)
    torch.testing.assert_close(g, torch.tensor([0.0, 0.25]))
