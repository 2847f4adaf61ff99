"""Programs that differ only in their model."""

from torch import nn
from torch.optim import Adam

from tests.numerics.models import task, train_loss, val_loss
from tests.numerics.program import Setup
from tests.numerics.reference import Learner

EPS = 1e-3


def trained(model: nn.Module, kind: str = "mlp", steps: int = 3) -> Setup:
    """Adam on `model` under the class weights."""

    def loop(model, meta, batches, val):
        opt = Adam(model.parameters(), lr=0.05, eps=EPS)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            learner.step(Adam, learner.grads(train_loss(learner, meta, x, y)), lr=0.05, eps=EPS)
        return val_loss(learner, val)

    return Setup(loop, reference, {**task(kind, steps).args(), "model": model})
