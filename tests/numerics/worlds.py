"""Two copies of one world, for tests of repeated calls.

The compiled loop lives in the first copy, the plain loop and the reference in the second. Whatever a test
changes, it changes in both; after every call values, gradients, random state and everything that a loop
leaves behind must agree, and `recordings` counts how often the user's Python really ran.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from tests.numerics.models import CLASSES, task, train_loss, val_loss
from tests.numerics.program import SEED, Setup, describe, gradients, same, total
from tests.numerics.reference import Learner, worst


class World(Setup):
    """A setup whose closure can be changed from outside."""

    rebind: Callable[..., None]


def world(steps: int = 3, make_optimizer: Any = SGD) -> World:
    """Weighted training with dropout; data, a scale and a rate live in the closure."""
    args = task("mlp", steps).args()
    args["model"] = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, CLASSES))
    val, lr, box = args.pop("val"), 0.1, {"scale": torch.tensor(1.0)}

    def loop(model, meta, batches, temperature=1.0, squared=False):
        opt = make_optimizer(model.parameters(), lr=lr, momentum=0.9)
        for x, y in batches:
            opt.zero_grad()
            loss = train_loss(model, meta, x * box["scale"] / temperature, y)
            (loss * loss if squared else loss).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, batches, temperature=1.0, squared=False):
        learner = Learner(model)
        for x, y in batches:
            loss = train_loss(learner, meta, x * box["scale"] / temperature, y)
            loss = loss * loss if squared else loss
            learner.step(SGD, learner.grads(loss), lr=lr, momentum=0.9)
        return val_loss(learner, val)

    def rebind(**new: Any) -> None:
        nonlocal val, lr
        val, lr = new.get("val", val), new.get("lr", lr)
        box.update({k: v for k, v in new.items() if k == "scale"})

    made = World(loop, reference, args)
    made.rebind = rebind
    made.val, made.box = val, box  # type: ignore[attr-defined]
    return made


class Twins:
    """The two copies, and calls that compare them."""

    def __init__(self, mlc: ModuleType, make: Callable[[], Setup] = world, **options: Any) -> None:
        torch.manual_seed(SEED)
        self.one = make()
        torch.manual_seed(SEED)
        self.two = make()
        self.compiled = mlc.compile(self.one.loop, **options)
        self.calls = 0

    def change(self, how: Callable[[Any], None]) -> None:
        """Apply a deterministic change to both copies."""
        for each in (self.one, self.two):
            torch.manual_seed(SEED + 1 + self.calls)
            how(each)

    def call(self, tolerance: float = 1e-9) -> None:
        """Call the compiled loop and hold everything against the second copy."""
        self.calls += 1
        seed = 100 + self.calls
        torch.manual_seed(seed)
        out = self.compiled(**self.one.args)
        draws = torch.get_rng_state()
        torch.manual_seed(seed)
        expected = gradients(total(self.two.reference(**self.two.args)), self.two.meta)
        before = {n: t.grad for n, t in self.two.meta.items()}
        torch.manual_seed(seed)
        plain = self.two.loop(**self.two.args)
        for n, t in self.two.meta.items():  # the one deliberate difference
            t.grad = before[n]
        same(describe(out), describe(plain), "output", 1e-10)
        assert torch.equal(draws, torch.get_rng_state()), "random state"
        for name, thing in self.two.args.items():
            same(describe(self.one.args[name]), describe(thing), name)
        error, name = worst(gradients(total(out), self.one.meta), expected)
        assert error <= tolerance, f"call {self.calls}, {name}: relative error {error:.2e}"

    @property
    def traces(self) -> int:
        """How often the body ran in the compiled copy."""
        return self.compiled.recordings

    def call_cached(self) -> None:
        """A call that must not run the user's Python again."""
        before = self.traces
        self.call()
        assert self.traces == before, "the user's Python ran again"

    def call_traced(self) -> None:
        """A call that must run it again."""
        before = self.traces
        self.call()
        assert self.traces > before, "the change went unnoticed"
