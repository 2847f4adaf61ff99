"""mlc.check: it confirms what is right, names what is wrong, and leaves everything as it was."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mlc
from mlc.runtime.call import Executor
from mlc.trace.recorder.tracer import Tracer


class Weights(nn.Module):
    """Two meta-parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.randn(4)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ self.slope + self.offset)


def train(model, weights, batches, val):
    opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-3)
    for x, y in batches:
        opt.zero_grad()
        (weights(x) * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        opt.step()
    return F.cross_entropy(model(val[0]), val[1])


def task(steps: int = 3):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(steps)]
    return model, Weights(), batches, (torch.randn(8, 4), torch.randint(3, (8,)))


def test_confirms_a_float32_loop_in_float64() -> None:
    report = mlc.check(train, *task())
    assert report.ok, str(report)
    assert report.rel_err < 1e-12
    assert report.value_err < 1e-12
    assert report.state_err < 1e-12
    assert report.differences_err < 1e-6
    assert {m.name for m in report.metas} == {"weights.slope", "weights.offset"}
    assert report.disagreeing == ()
    text = str(report)
    assert text.startswith("mlc.check of train: ok")
    assert "weights.slope" in text
    assert "the function itself" in text


def test_takes_compiled_functions_with_their_options() -> None:
    compiled = mlc.compile(memory="1GiB", stop_gradient="all")(train)
    assert mlc.check(compiled, *task()).ok
    assert compiled.program is None, "the user's own function has not been called"


def test_in_float32_with_tolerances_to_match() -> None:
    report = mlc.check(train, *task(), dtype=torch.float32)
    assert report.ok, str(report)
    assert 1e-9 < report.tolerances.exact < 1e-3
    with pytest.raises(mlc.PlanError, match="float64"):
        mlc.check(train, *task(), dtype=torch.bfloat16)


def scaled_gradient(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A compiler that gets the largest gradient slightly wrong."""
    right = Executor.backward

    def wrong(self, *args, **kwargs):
        found = right(self, *args, **kwargs)
        worst = max(range(len(found)), key=lambda i: float(found[i].norm()))
        return [g * factor if i == worst else g for i, g in enumerate(found)]

    monkeypatch.setattr(Executor, "backward", wrong)


def test_names_the_meta_parameter_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    args = task()
    norms = {m.name: m.norm for m in mlc.check(train, *args).metas}
    scaled_gradient(monkeypatch, 1 + 1e-5)
    report = mlc.check(train, *args)
    assert not report.ok
    worst = max(norms, key=norms.__getitem__)
    assert report.disagreeing == (worst,)
    assert report.rel_err == pytest.approx(1e-5, rel=1e-3)
    assert f"{worst:40s}" in str(report)
    assert "disagrees" in str(report)


def test_differences_alone_see_an_error_of_a_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled_gradient(monkeypatch, 1.01)
    report = mlc.check(train, *task())
    assert any(not d.ok for d in report.differences)
    assert len(report.differences) == 4, "two directions, then one for each meta-parameter"


def test_sees_a_trace_that_is_not_the_function() -> None:
    def two_faced(model, weights, batches, val):
        return train(model, weights, batches, val) * (2.0 if Tracer.current is not None else 1.0)

    report = mlc.check(two_faced, *task())
    assert report.rel_err < 1e-12, "the unroll shares the trace"
    assert not report.ok
    assert report.value_err > 0.1
    assert not report.differences[0].ok


def test_a_cut_path_is_judged_with_the_cut_value_frozen() -> None:
    def detached(model, weights, batches, val):
        opt = torch.optim.SGD(model.parameters(), lr=0.5)
        for x, y in batches:
            opt.zero_grad()
            w = weights(x)
            (w / w.sum().detach() * F.cross_entropy(model(x), y, reduction="none")).sum().backward()
            opt.step()
        return F.cross_entropy(model(val[0]), val[1])

    report = mlc.check(detached, *task())
    assert report.ok, str(report)
    assert "frozen" in report.referee
    assert any("cut at" in n and "test_check.py" in n for n in report.notes)


def test_inner_stops() -> None:
    def penalised(model, weights, batches, val):
        opt = torch.optim.SGD(model.parameters(), lr=0.5)
        for x, y in batches:
            opt.zero_grad()
            scale = model[0].weight.square().mean().detach()
            (scale * weights(x) * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
            opt.step()
        return F.cross_entropy(model(val[0]), val[1])

    both = [mlc.check(mlc.compile(stop_gradient=s)(penalised), *task()) for s in ("all", "inner")]
    assert all(r.ok for r in both), "\n".join(map(str, both))
    assert both[0].metas[0].norm != both[1].metas[0].norm


class Twice(torch.autograd.Function):
    """Its backward is deliberately not its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x.cos()


def test_a_custom_backward_is_taken_as_it_is() -> None:
    def custom(model, weights, batches, val):
        model = nn.Sequential(model[0], model[1], model[4])
        opt = torch.optim.SGD(model.parameters(), lr=0.5)
        for x, y in batches:
            opt.zero_grad()
            (weights(x) * F.cross_entropy(Twice.apply(model(x)), y, reduction="none")).mean().backward()
            opt.step()
        return F.cross_entropy(model(val[0]), val[1])

    report = mlc.check(custom, *task())
    assert report.ok, str(report)
    assert any("Twice" in n for n in report.notes)


def test_an_update_by_adam_at_a_gradient_of_zero() -> None:
    def dead(model, weights, batches, val):
        opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-3)
        for x, _ in batches:
            opt.zero_grad()
            out = model(x) * torch.tensor([1.0, 1.0, 0.0])  # the last row of the head has a gradient of 0
            (weights(x) * out.square().sum(1)).mean().backward()
            opt.step()
        return model(val[0])[:, :2].square().mean()

    report = mlc.check(dead, *task())
    assert report.rel_err < 1e-10, str(report)


def generator(n: int) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(n):
        yield torch.full((6, 4), 0.1 * i) + torch.linspace(-1, 1, 24).view(6, 4), torch.arange(6) % 3


@pytest.mark.parametrize("kind", ["loader", "generator"])
def test_batches_of_float32_from_anywhere(kind: str) -> None:
    model, weights, batches, val = task()
    data = TensorDataset(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    source = DataLoader(data, batch_size=6, shuffle=True) if kind == "loader" else generator(3)
    report = mlc.check(train, model, weights, source, val)
    assert report.ok, str(report)


def test_outputs_of_any_structure() -> None:
    def several(model, weights, batches, val):
        loss = train(model, weights, batches, val)
        return {"loss": loss, "rows": [weights(val[0]), loss.detach()], "steps": len(batches)}

    assert mlc.check(several, *task()).ok


def world():
    """Everything a check could disturb: state by name."""
    model, weights, batches, val = task()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    model(batches[0][0]).sum().backward()
    opt.step()
    log: list[float] = []
    count = {"calls": 0}
    rates = weights.slope.exp()  # in the middle of a graph of the user's

    def loop(batches, rates):
        count["calls"] += 1
        for x, y in batches:
            opt.zero_grad()
            loss = (rates[0] * F.cross_entropy(model(x), y, reduction="none")).mean()
            loss.backward()
            opt.step()
            log.append(loss.item())
        return F.cross_entropy(model(val[0]), val[1])

    tensors = [*model.parameters(), *model.buffers(), *weights.parameters(), *val, batches[0][0], rates]
    tensors += [t for s in opt.state.values() for t in s.values()]
    return loop, (batches, rates), tensors, (model, opt, log, count, weights, rates)


def test_leaves_everything_as_it_was() -> None:
    loop, args, tensors, (model, opt, log, count, weights, rates) = world()
    before = [(t, t.detach().clone(), t.data_ptr(), t.dtype, t._version, t.requires_grad) for t in tensors]
    grads = [(p, p.grad, p.grad.clone()) for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    groups = [dict(g) for g in opt.param_groups]
    report = mlc.check(loop, *args)
    assert report.ok, str(report)
    for t, value, pointer, dtype, version, requires_grad in before:
        assert torch.equal(t, value)
        now = (t.data_ptr(), t.dtype, t._version, t.requires_grad)
        assert now == (pointer, dtype, version, requires_grad)
    for p, grad, value in grads:
        assert p.grad is grad
        assert torch.equal(grad, value)
    assert (log, count) == ([], {"calls": 0})
    assert [dict(g) for g in opt.param_groups] == groups
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert torch.get_default_dtype() is torch.float32
    rates.sum().backward()  # the user's own graph has not been used up
    assert weights.slope.grad is not None


def test_leaves_everything_as_it_was_after_an_error() -> None:
    _, args, tensors, (model, _, log, *_) = world()
    before = [(t, t.detach().clone(), t.dtype) for t in tensors]

    def broken(batches, rates):
        with torch.no_grad():
            model[0].weight.zero_()
        log.append(1.0)
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        mlc.check(broken, *args)
    assert all(torch.equal(t, value) and t.dtype is dtype for t, value, dtype in before)
    assert log == []


def test_says_when_float64_does_not_mix() -> None:
    def single(model, weights, batches, val):
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            (weights(x) * F.cross_entropy(model(x.float()), y, reduction="none")).mean().backward()
            opt.step()
        return F.cross_entropy(model(val[0].float()), val[1])

    with pytest.raises(mlc.MlcError) as caught:
        mlc.check(single, *task())
    assert "dtype=torch.float32" in caught.value.advice
    assert "dtype=torch.float32" in str(caught.value)
    assert mlc.check(single, *task(), dtype=torch.float32).ok
