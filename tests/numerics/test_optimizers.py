"""Every optimizer and flag, T from 1 to 10, on four kinds of models: compiled against the reference.

The default run is a covering set; the full product is slow.
"""

from functools import partial
from itertools import product
from types import ModuleType

import pytest
import torch.nn.functional as F

from tests.numerics.models import MODELS, task, train_loss
from tests.numerics.optimizers import OPTIMIZERS
from tests.numerics.program import Program, Setup, check_compiled, check_reference
from tests.numerics.reference import Learner

TRIPS = (1, 2, 3, 10)
FULL = list(product(OPTIMIZERS, MODELS, TRIPS))


def covering() -> list[tuple[str, str, int]]:
    """Each optimizer on the MLP at T=3, all T for a spread of them, and the larger models at a few."""
    names = list(OPTIMIZERS)
    chosen = [(name, "mlp", 3) for name in names]
    chosen += [(name, "mlp", (1, 2, 10)[i % 3]) for i, name in enumerate(names)]
    chosen += [(name, "mlp", 10) for name in ("radam", "nadam_decay", "asgd", "adafactor")]
    chosen += [("adam", "mlp", 1), ("sgd_momentum", "mlp", 1), ("rmsprop_centered", "mlp", 1)]
    large = ("sgd_nesterov", "adam", "adamw_amsgrad", "rmsprop_both")
    chosen += [(name, model, 2) for model in MODELS if model != "mlp" for name in large]
    chosen += [("adam", model, trips) for model in MODELS for trips in (1, 3)]
    chosen += [("adamw", "transformer", 10), ("sgd", "convbn", 10), ("adafactor", "lstm", 3)]
    chosen += [("adagrad", "convbn", 3), ("nadam", "lstm", 10), ("adadelta", "transformer", 3)]
    return list(dict.fromkeys(chosen))


def make(optimizer: str, kind: str, trips: int) -> Setup:
    cls, given = OPTIMIZERS[optimizer]

    def loop(model, meta, batches, val):
        opt = cls(model.parameters(), **given)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        x, y = val
        return F.cross_entropy(model(x), y)

    def reference(model, meta, batches, val):
        learner = Learner(model)
        for x, y in batches:
            learner.step(cls, learner.grads(train_loss(learner, meta, x, y)), **given)
        x, y = val
        return F.cross_entropy(learner(x), y)

    return Setup(loop, reference, task(kind, trips).args())


def program(optimizer: str, kind: str, trips: int) -> Program:
    # Adafactor clamps at quantities that differences step across; a maximum has a kink.
    rough = optimizer.startswith(("adafactor", "adamax")) or "amsgrad" in optimizer
    return Program(partial(make, optimizer, kind, trips), differences=1e-5 if rough else 3e-6)


COVERING = pytest.mark.parametrize("case", covering(), ids=lambda case: "-".join(map(str, case)))


@COVERING
def test_reference(case: tuple[str, str, int]) -> None:
    check_reference(program(*case))


@COVERING
def test_compiled(case: tuple[str, str, int], mlc: ModuleType) -> None:
    check_compiled(program(*case), mlc)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=lambda case: "-".join(map(str, case)))
def test_full_product(case: tuple[str, str, int], mlc: ModuleType) -> None:
    check_compiled(program(*case), mlc)
