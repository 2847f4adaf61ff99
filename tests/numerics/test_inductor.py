"""Compiled segments against the plain unroll in float64: the same programs as elsewhere, through Inductor."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD, Adam

from mlc.runtime.inductor import lowering as inductor
from tests.numerics.models import CLASSES, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, check_compiled
from tests.numerics.reference import Learner

EPS = 1e-3


@pytest.fixture
def compiling(mlc: ModuleType) -> Any:
    """mlc with `backend="inductor"`."""
    return SimpleNamespace(
        compile=lambda fn, **options: mlc.compile(fn, backend="inductor", **options), clone=mlc.clone
    )


def lowered(program: Program, compiling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are right, and they came from compiled segments (warnings are errors)."""
    monkeypatch.setattr(inductor, "_KERNELS", {})
    check_compiled(program, compiling)
    states = [k.state for k in inductor._KERNELS.values()]
    assert states.count("trusted") > len(states) // 2


def trained(kind: str, optimizer: Any, **hyper: Any) -> Setup:
    def loop(model, meta, batches, val):
        opt = optimizer(model.parameters(), **hyper)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            learner.step(optimizer, learner.grads(train_loss(learner, meta, x, y)), **hyper)
        return val_loss(learner, val)

    return Setup(loop, reference, task(kind, steps=4).args())


def test_mlp_with_adam(compiling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def mlp_with_adam() -> Setup:
        return trained("mlp", Adam, lr=0.05, eps=EPS)

    lowered(Program(mlp_with_adam), compiling, monkeypatch)


@pytest.mark.slow
def test_convolution_with_batch_norm(compiling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def convbn() -> Setup:
        return trained("convbn", SGD, lr=0.1)

    lowered(Program(convbn), compiling, monkeypatch)


@pytest.mark.slow
def test_transformer_with_embedding(compiling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def transformer() -> Setup:
        return trained("transformer", Adam, lr=0.05, eps=EPS)

    lowered(Program(transformer), compiling, monkeypatch)


@pytest.mark.slow
def test_dropout_in_the_loop(compiling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def dropout() -> Setup:
        setup = trained("mlp", SGD, lr=0.1)
        setup.args["model"] = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, CLASSES))
        return setup

    lowered(Program(dropout), compiling, monkeypatch)
