"""`verify="gradient"`: a wrong derivative rule is caught at the first call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlc
from mlc.passes.autodiff import reverse


def loop(model, w, batches):
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        (w * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        opt.step()
    return F.cross_entropy(model(batches[0][0]), batches[0][1])


def args():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = [(torch.randn(5, 4).double(), torch.randint(3, (5,))) for _ in range(3)]
    return model, torch.rand(5, dtype=torch.float64, requires_grad=True), batches


def test_a_right_gradient_passes() -> None:
    made = args()
    mlc.compile(loop, verify="gradient")(*made).backward()
    assert made[1].grad is not None


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = reverse._pull_aten

    def planted(b, e, cts, active):
        before = dict(cts)
        true(b, e, cts, active)
        if str(e.op) == "aten.mul.Tensor":
            for v in e.inputs:
                if v in cts and cts[v] is not before.get(v):
                    (cts[v],) = b.emit(torch.ops.aten.mul.Scalar, (cts[v], 1.1), (cts[v].type,))

    monkeypatch.setattr(reverse, "_pull_aten", planted)
    with pytest.raises(mlc.VerifyError):  # the inner gradient is wrong, or only the one through the loop
        mlc.compile(loop, verify="gradient")(*args())


def test_a_rule_that_is_wrong_through_the_loop_only_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root in Adam's step: values are right, the hypergradient is not."""

    def adam(w, x):
        p = nn.Parameter(torch.ones(5, dtype=torch.float64))
        opt = torch.optim.Adam([p], lr=0.1, eps=1e-2)
        for _ in range(3):
            opt.zero_grad()
            ((p * w).sin() * x).sum().backward()
            opt.step()
        return (p * x).sum()

    true = reverse._safe_sqrt
    monkeypatch.setattr(reverse, "_safe_sqrt", lambda b, e, ct: b.add(true(b, e, ct), true(b, e, ct)))
    w, x = torch.rand(5, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    with pytest.raises(mlc.VerifyError, match="does not agree with differences"):
        mlc.compile(adam, flows="reverse", verify="gradient")(w, x)


def test_another_word_is_refused() -> None:
    with pytest.raises(mlc.PlanError):
        mlc.compile(loop, verify="everything")
