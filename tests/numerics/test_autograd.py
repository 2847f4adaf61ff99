"""The result is an ordinary autograd node: backward, grad, retain_graph, hooks, and outer graphs."""

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from tests.numerics.models import task, train_loss, val_loss
from tests.numerics.program import Program, Setup, gradients
from tests.numerics.reference import Learner, Tensors, worst


def loop(model, meta, batches, val):
    opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()
    return val_loss(model, val)


def reference(model, meta, batches, val):
    learner = Learner(model)
    for x, y in batches:
        learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.1, momentum=0.9)
    return val_loss(learner, val)


PROGRAM = Program(lambda: Setup(loop, reference, task().args()))


def expected() -> Tensors:
    setup = PROGRAM.fresh()
    return gradients(setup.reference(**setup.args), setup.meta)


def called(mlc: ModuleType) -> tuple[Setup, Tensor]:
    setup = PROGRAM.fresh()
    return setup, mlc.compile(loop)(**setup.args)


def close(got: Tensors, want: Tensors, tolerance: float = 1e-9) -> None:
    error, name = worst(got, want)
    assert error <= tolerance, f"{name}: {error:.2e}"


def grads_of(setup: Setup) -> Tensors:
    return {n: t.grad for n, t in setup.meta.items()}  # type: ignore[misc]


def test_backward_fills_grad(mlc: ModuleType) -> None:
    setup, loss = called(mlc)
    assert all(t.grad is None for t in setup.meta.values())
    loss.backward()
    close(grads_of(setup), expected())


def test_backward_adds_to_grad(mlc: ModuleType) -> None:
    setup = PROGRAM.fresh()
    for t in setup.meta.values():
        t.grad = torch.ones_like(t)
    loss = mlc.compile(loop)(**setup.args)
    assert all(torch.equal(t.grad, torch.ones_like(t)) for t in setup.meta.values())
    loss.backward()
    close(grads_of(setup), {n: g + 1 for n, g in expected().items()})


def test_backward_leaves_the_model_s_grad_alone(mlc: ModuleType) -> None:
    setup, loss = called(mlc)
    before = [None if p.grad is None else p.grad.clone() for p in setup.args["model"].parameters()]
    loss.backward()
    for old, p in zip(before, setup.args["model"].parameters(), strict=True):
        assert (old is None) == (p.grad is None)
        assert old is None or torch.equal(old, p.grad)


def test_retain_graph(mlc: ModuleType) -> None:
    setup, loss = called(mlc)
    loss.backward(retain_graph=True)
    loss.backward()
    close(grads_of(setup), {n: 2 * g for n, g in expected().items()})


def test_a_second_backward_needs_retain_graph(mlc: ModuleType) -> None:
    _, loss = called(mlc)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_grad_of_one_meta_parameter(mlc: ModuleType) -> None:
    setup, loss = called(mlc)
    (g,) = torch.autograd.grad(loss, [setup.meta["log_l2"]])
    close({"log_l2": g}, {"log_l2": expected()["log_l2"]})
    assert setup.meta["log_l2"].grad is None


def test_create_graph_is_an_error_that_says_what_to_do(mlc: ModuleType) -> None:
    setup, loss = called(mlc)
    with pytest.raises(mlc.MlcError, match=r"(?is)create_graph.*(inside|within|into)"):
        torch.autograd.grad(loss, list(setup.meta.values()), create_graph=True)
    setup, loss = called(mlc)
    with pytest.raises(mlc.MlcError):
        loss.backward(create_graph=True)


def test_further_computation_on_the_result(mlc: ModuleType) -> None:
    setup, loss = called(mlc)
    want = {n: (1 + 2 * float(loss.detach())) * g for n, g in expected().items()}
    close(gradients(loss + loss**2, setup.meta), want)


def test_meta_parameters_with_a_graph_of_their_own(mlc: ModuleType) -> None:
    """The meta tensors are results of an outer computation, whose leaves receive the gradient."""

    def run(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            (meta["w"][y] * (model(x) - 1).square().mean(1)).mean().backward()
            opt.step()
        return val_loss(model, val)

    def plain(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            loss = (meta["w"][y] * (learner(x) - 1).square().mean(1)).mean()
            learner.step(SGD, learner.grads(loss), lr=0.1)
        return val_loss(learner, val)

    found = []
    for fn in (mlc.compile(run), plain):
        torch.manual_seed(1)
        args, net = task().args(), nn.Linear(2, 3)
        args["meta"] = {"w": torch.sigmoid(net(torch.ones(2)))}
        (2 * fn(**args) + net.bias.square().sum()).backward()
        found.append({n: p.grad for n, p in net.named_parameters()})
    close(*found)


def test_hooks_on_meta_parameters(mlc: ModuleType) -> None:
    setup, seen = PROGRAM.fresh(), []
    source = setup.meta["source"]
    source.register_hook(lambda g: seen.append(g.clone()) or 3 * g)
    source.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    loss = mlc.compile(loop)(**setup.args)
    assert source.grad is None
    seen.clear()  # the loop's own backward() ran them, as in eager
    loss.backward()
    want = expected()["source"]
    close({"hook": seen[0], "after": seen[1]}, {"hook": want, "after": 3 * want})
    assert len(seen) == 2


def test_a_hook_on_the_result(mlc: ModuleType) -> None:
    setup, loss = called(mlc)
    loss.register_hook(lambda g: 5 * g)
    close(gradients(loss, setup.meta), {n: 5 * g for n, g in expected().items()})


def test_no_grad_gives_a_plain_value(mlc: ModuleType) -> None:
    setup, other = PROGRAM.fresh(), PROGRAM.fresh()
    with torch.no_grad():
        loss = mlc.compile(loop)(**setup.args)
    assert not loss.requires_grad and torch.is_grad_enabled()
    assert float(loss) == pytest.approx(float(loop(**other.args).detach()), rel=1e-10)


def test_two_calls_before_either_backward(mlc: ModuleType) -> None:
    """The second call moves the model in place: what the first kept must be its own."""
    setup, other = PROGRAM.fresh(), PROGRAM.fresh()
    compiled = mlc.compile(loop)
    want = []
    for _ in range(2):
        want.append(gradients(reference(**other.args), other.meta))
        loop(**other.args)
    first, second = compiled(**setup.args), compiled(**setup.args)
    close(gradients(first, setup.meta), want[0])
    close(gradients(second, setup.meta), want[1])


def test_the_model_is_reset_before_backward(mlc: ModuleType) -> None:
    setup, loss = called(mlc)
    for p in setup.args["model"].parameters():
        nn.init.zeros_(p)
    close(gradients(loss, setup.meta), expected())


@pytest.mark.parametrize("what", ["data", "meta"])
def test_inputs_changed_before_backward_are_noticed_or_harmless(what: str, mlc: ModuleType) -> None:
    """Eager autograd raises here; a silently wrong number is the one thing that is not allowed."""
    setup, loss = called(mlc)
    with torch.no_grad():
        if what == "data":
            setup.args["batches"][0][0].zero_()
            setup.args["val"][0].zero_()
        else:
            setup.meta["source"].add_(1.0)
            setup.meta["log_l2"].add_(1.0)
    try:
        got = gradients(loss, setup.meta)
    except (RuntimeError, mlc.MlcError):
        return
    close(got, expected())


def test_an_outer_optimizer_follows_the_reference(mlc: ModuleType) -> None:
    ends = []
    for fn in (mlc.compile(loop), reference):
        setup = PROGRAM.fresh()
        start = {n: t.clone() for n, t in setup.args["model"].state_dict().items()}
        outer = Adam(setup.args["meta"].parameters(), lr=0.1, eps=1e-3)
        for _ in range(5):
            setup.args["model"].load_state_dict(start)
            outer.zero_grad()
            fn(**setup.args).backward()
            outer.step()
        ends.append({n: t.detach() for n, t in setup.meta.items()})
    close(*ends, tolerance=1e-8)


def test_a_gradient_taken_under_no_grad(mlc: ModuleType) -> None:
    setup, loss = called(mlc)
    with torch.no_grad():
        found = torch.autograd.grad(loss, list(setup.meta.values()))
    close(dict(zip(setup.meta, found, strict=True)), expected())
