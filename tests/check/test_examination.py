"""mlc.check: what it believes where its referees disagree, and what it does with odd functions."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc
from mlc.check.examination import Examination
from mlc.check.report import best_pair, relative
from mlc.check.sandbox import Sandbox
from mlc.runtime.call import Executor
from mlc.trace.recorder.tracer import Tracer
from tests.check.test_check import scaled_gradient, task, train


def hand(w: Tensor, rate: Tensor, start: Tensor, loss) -> Tensor:
    """Two steps of gradient descent on ``loss(x, w)``."""
    x = start.clone().requires_grad_()
    opt = torch.optim.SGD([x], lr=rate)
    for _ in range(2):
        opt.zero_grad()
        loss(x, w).backward()
        opt.step()
    return x.square().sum()


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(3, requires_grad=True), torch.tensor(0.1, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])


def test_differences_overrule_a_wrong_unroll(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Examination._pulled

    def wrong(self, unroll):
        outs, found = right(self, unroll)
        return outs, [g * 1.01 for g in found]

    monkeypatch.setattr(Examination, "_pulled", wrong)
    report = mlc.check(train, *task())
    assert report.ok, str(report)
    assert report.rel_err < 1e-5, "against differences, where the unroll does not count"
    assert all(m.overruled for m in report.metas)
    assert "overrule" in str(report)
    assert any("differences confirm" in n for n in report.notes)


def test_differences_and_the_unroll_together_overrule_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled_gradient(monkeypatch, 1 + 1e-6)
    report = mlc.check(train, *task())
    assert not report.ok
    assert not any(m.overruled for m in report.metas)


def test_a_fused_weight_norm() -> None:
    def loop(model, rate, data):
        opt = torch.optim.SGD(model.parameters(), lr=rate)
        for x, y in data:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        return F.cross_entropy(model(data[0][0]), data[0][1])

    torch.manual_seed(3)
    wrap = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(wrap(nn.Linear(4, 5)), nn.Tanh(), wrap(nn.Linear(5, 3)))
    data = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(2)]
    report = mlc.check(loop, model, torch.tensor(0.2, requires_grad=True), data)
    assert report.ok, str(report)


def test_a_gradient_that_is_no_number_is_not_right() -> None:
    def loop(w, rate, start):
        return hand(w, rate, start, lambda x, w: (torch.where(w > -10, w, (w - w).sqrt()) * x.square()).sum())

    report = mlc.check(loop, *tensors())
    assert not report.ok
    assert report.rel_err != report.rel_err
    assert "w" in report.disagreeing
    assert any("gradient of w is not finite" in n and "test_examination.py" in n for n in report.notes)


def test_no_number_where_the_unroll_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled_gradient(monkeypatch, float("nan"))
    report = mlc.check(train, *task())
    assert not report.ok
    assert any("the plain unroll's is finite" in n for n in report.notes)


def test_a_value_that_is_no_number_is_right_where_the_function_gives_it() -> None:
    def loop(w, rate, start):
        return hand(w, rate, start, lambda x, w: ((-w.square()).log() * x.square()).sum())

    report = mlc.check(loop, *tensors())
    assert report.ok, str(report)
    assert any("the function itself returns" in n and "test_examination.py" in n for n in report.notes)


@pytest.mark.parametrize("kind", ["normal", "bernoulli", "multinomial"])
def test_samples_are_constants(kind: str) -> None:
    def sample(x: Tensor) -> Tensor:
        if kind == "normal":
            return torch.normal(x, torch.ones_like(x))
        if kind == "bernoulli":
            return torch.bernoulli(torch.sigmoid(x))
        return torch.multinomial(torch.softmax(x, 0), 3, replacement=True).to(x.dtype)

    def loop(w, rate, start):
        def loss(x: Tensor, w: Tensor) -> Tensor:
            with torch.no_grad():
                a = sample(x)
            return (w * (x - a).square()).sum()

        return hand(w, rate, start, loss)

    report = mlc.check(loop, *tensors())
    assert report.ok, str(report)
    assert max(d.error for d in report.differences) < 1e-5


def test_a_player_whose_cut_is_another_ones() -> None:
    def players(critic, gen, rates, data):
        ours, theirs = (torch.optim.SGD(m.parameters(), lr=r) for m, r in zip((critic, gen), rates, strict=True))
        for real, z in data:
            fake = gen(z)
            ours.zero_grad()
            (F.softplus(critic(fake.detach())) + F.softplus(-critic(real))).mean().backward()
            ours.step()
            theirs.zero_grad()
            F.softplus(-critic(fake)).mean().backward()
            theirs.step()
        return F.softplus(-critic(gen(z))).mean() + F.softplus(critic(real)).mean()

    torch.manual_seed(0)
    rates = [torch.tensor(r, requires_grad=True) for r in (0.1, 0.05)]
    data = [(torch.randn(6, 3) + 1, torch.randn(6, 2)) for _ in range(3)]
    report = mlc.check(mlc.compile(stop_gradient="inner")(players), nn.Linear(3, 1), nn.Linear(2, 3), rates, data)
    assert report.ok, str(report)
    assert report.referee == "the function itself", "what is cut for inner gradients is not for the value's derivative"


def test_a_recording_that_is_not_the_function_where_values_are_cut() -> None:
    number = {"w": 3.0}

    def loop(w, rate, start):
        seen = w.sum() if Tracer.current is None else torch.tensor(number["w"], dtype=w.dtype)
        return hand(w, rate, start, lambda x, w: seen * (w * x.square()).sum() / (w * x).sum().detach())

    report = mlc.check(loop, *tensors())
    assert report.value_err < 1e-12
    assert "frozen" in report.referee
    assert not report.ok
    assert "nothing frozen: recording" in str(report)


def test_declared_levels_are_judged_by_the_recording() -> None:
    def bilevel(rate, start):
        lam, x = start.clone().requires_grad_(), torch.zeros(3, requires_grad=True)
        outer = torch.optim.SGD([lam], lr=rate)
        for _ in range(2):
            with mlc.level("inner"):
                inner = torch.optim.SGD([x], lr=0.1)
                for _ in range(2):
                    inner.zero_grad()
                    (x - lam).square().sum().backward()
                    inner.step()
            outer.zero_grad()
            (x - 1).square().sum().backward()
            outer.step()
        return (x - 1).square().sum() + lam.square().sum()

    report = mlc.check(bilevel, torch.tensor(0.1, requires_grad=True), torch.tensor([1.0, 2.0, 3.0]))
    assert report.ok, str(report)
    assert report.referee.startswith("the recording")
    assert any("mlc.level" in n for n in report.notes)
    assert report.metas[0].norm > 1e-3


def test_what_is_recorded_anew_at_every_call() -> None:
    def loop(w, rate, start):
        def loss(x: Tensor, w: Tensor) -> Tensor:
            b = torch.from_numpy(np.random.randn(3)).to(x.dtype)
            return (random.random() * w * (x - b).square()).sum()

        return hand(w, rate, start, loss)

    before = random.getstate()
    report = mlc.check(loop, *tensors())
    assert report.ok, str(report)
    assert random.getstate() == before


HIDDEN = torch.tensor([0.3, 0.2, 0.1], requires_grad=True)


class Shift:
    """Reads a global in a method, and an attribute of its class."""

    moved = torch.zeros(3)

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            Shift.moved += 1
        return x + HIDDEN + 0.01 * Shift.moved


def test_what_only_methods_reach_is_checked_and_put_back() -> None:
    def loop(w, rate, start):
        shift = Shift()
        return hand(w, rate, start, lambda x, w: (w * shift(x).square()).sum())

    report = mlc.check(loop, *tensors())
    assert report.ok, str(report)
    assert report.referee == "the function itself"
    assert report.tolerances.exact == 1e-7, "in float64"
    assert "HIDDEN" in " ".join(m.name for m in report.metas)
    assert HIDDEN.dtype is torch.float32
    assert torch.equal(Shift.moved, torch.zeros(3))


def test_a_meta_parameter_made_in_the_call() -> None:
    given = np.ones(3)

    def loop(w, rate, start):
        made = torch.from_numpy(given.copy()).requires_grad_()
        return hand(w, rate, start, lambda x, w: (made * w * x.square()).sum())

    report = mlc.check(loop, *tensors())
    assert report.ok, str(report)
    assert report.referee == "the recording"
    assert any("is made in the call" in n for n in report.notes)


ELSEWHERE = nn.Linear(2, 2, device="meta")


def test_a_module_without_memory_and_one_that_only_evaluates() -> None:
    def loop(w, rate, start):
        assert ELSEWHERE.in_features == 2
        norm = nn.BatchNorm1d(3).eval()
        return hand(w, rate, start, lambda x, w: (w * norm(x[None]).square()).sum())

    report = mlc.check(loop, *tensors())
    assert report.ok, str(report)


def test_errors_of_types_are_known_by_their_operands_not_by_their_words() -> None:
    def words(w, rate, start):
        raise ValueError("this dtype is not for me")

    def other(w, rate, start):
        return (w * start @ torch.ones(7, dtype=w.dtype)).sum()  # no dtype is to blame

    def single(w, rate, start):
        return torch.dot(w, start.float())

    with pytest.raises(ValueError, match="not for me"):
        mlc.check(words, *tensors())
    for loop, in64 in ((other, False), (single, True)):
        with pytest.raises(mlc.MlcError) as caught:
            mlc.check(loop, *tensors())
        assert ("float64" in caught.value.what) is in64
        assert ("torch.float32" in caught.value.advice) is in64
        assert caught.value.loc.file == __file__
        assert "return" in caught.value.loc.source()


def test_whatever_goes_wrong_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self, *args, **kwargs):
        raise KeyError("inside")

    with pytest.raises(mlc.PlanError) as caught:
        mlc.check(train, *task(), dtype=torch.float16)
    assert caught.value.loc.file == train.__code__.co_filename
    monkeypatch.setattr(Executor, "backward", wrong)
    with pytest.raises(mlc.MlcError, match="fault of mlc") as caught:
        mlc.check(train, *task())
    assert caught.value.loc.file == __file__
    with pytest.raises(mlc.MlcError) as caught:
        mlc.check(lambda w: w.detach().sum(), torch.ones(2, requires_grad=True))
    assert caught.value.loc.file == __file__


def test_a_file_is_left_as_the_call_leaves_it(tmp_path: Path) -> None:
    file = tmp_path / "best.pt"

    def loop(w, rate, start):
        end = hand(w, rate, start, lambda x, w: (w * x.square()).sum())
        torch.save(end.detach(), file)
        return end

    w, rate, start = tensors()
    wanted = loop(w, rate, start).item()
    assert mlc.check(loop, w, rate, start).ok
    assert torch.load(file).item() == pytest.approx(wanted, rel=1e-6)


def test_steps_out_of_the_domain_do_not_count() -> None:
    nan = float("nan")
    assert best_pair([nan, 1.0, 1.1]) == pytest.approx((1.05, 0.1))
    assert best_pair([nan, 1.0, nan])[1] == float("inf")


def test_shared_memory_stays_shared() -> None:
    whole = torch.arange(12.0)
    part, box = whole[4:8], Sandbox(torch.float64)
    box.enter([whole, part])
    box.ready()
    part.mul_(2)
    assert whole.dtype is torch.float64
    assert whole[4] == 8
    box.reset()
    assert whole[4] == 4
    box.restore()
    assert whole.dtype is torch.float32
    assert torch.equal(whole, torch.arange(12.0))


def test_a_lazy_module_is_lazy_again() -> None:
    model, box = nn.Sequential(nn.LazyLinear(3)), Sandbox(torch.float64)
    box.enter(model)
    box.ready()
    for _ in range(2):
        box.reset()
        assert type(model[0]) is nn.LazyLinear
        model(torch.randn(2, 5, dtype=torch.float64)).sum().backward()
        assert model[0].weight.shape == (3, 5)
    box.restore()
    assert type(model[0]) is nn.LazyLinear
    assert model(torch.randn(2, 7)).dtype is torch.float32


def test_relative_errors() -> None:
    one = torch.tensor([1.0, 2.0])
    assert relative(one, one) == 0
    assert relative(one, one + 1) == pytest.approx(2**0.5 / 13**0.5)
    assert relative(one, torch.ones(3)) == float("inf")
    assert not relative(torch.tensor([float("nan"), 1.0]), one) <= 1
    same = torch.tensor([float("inf"), 1.0])
    assert relative(same, same.clone()) == 0
    assert best_pair([1.0, 3.0, 3.1, 9.0]) == pytest.approx((3.05, 0.1))
