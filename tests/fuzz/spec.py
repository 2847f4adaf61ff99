"""What a program is made of: one choice per axis, several meta-parameters and several extras, as plain data.

A spec is drawn from a seed (`generate`), written as source (`program`), made smaller (`shrink`), and reads back from
its JSON, so that any program can be run again without the seed that made it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

LISTS = ("metas", "extras")


@dataclass(frozen=True)
class Spec:
    """One program.

    Attributes:
        seed: Of the data and the initial values, and where it was drawn from.
        model: Of `tests.fuzz.models`; `act` is its activation, where it has one.
        act: See there.
        loss: Of the inner step and of the result.
        data: How the batches come.
        loop: How the loop runs over them.
        update: The optimizer, or how the parameters are updated without one.
        place: Where model and optimizer are made: "outside" the function or "inside".
        metas: Meta-parameters, at least one.
        extras: Everything else that happens in the loop.
        result: What is returned: "scalar", "tuple" or "dict".
        end: Mode of the model for the result: "train" or "eval".
        steps: Batches per pass over the data.
        batch: Examples per batch.
        identity: Insert `x * 1.0` and clones that change nothing (for a metamorphic test).
    """

    seed: int
    model: str = "linear"
    act: str = "Tanh"
    loss: str = "cross_entropy"
    data: str = "tuples"
    loop: str = "for_"
    update: str = "sgd"
    place: str = "inside"
    metas: tuple[str, ...] = ("ridge",)
    extras: tuple[str, ...] = ()
    result: str = "scalar"
    end: str = "train"
    steps: int = 3
    batch: int = 4
    identity: bool = False

    @property
    def title(self) -> str:
        """One line that says what it is, for the head of the file."""
        return f"{self.model} {self.loss} {self.update}, {'+'.join(self.metas)}, {'+'.join(self.extras) or 'plain'}"

    def features(self) -> dict[str, tuple[str, ...]]:
        """Choices by axis, for the coverage."""
        found = {a: (str(getattr(self, a)),) for a in AXES}
        return {**found, "metas": self.metas, "extras": self.extras or ("none",)}

    def dump(self) -> str:
        """JSON, without what is as simple as can be."""
        plain = asdict(Spec(self.seed))
        return json.dumps({k: v for k, v in asdict(self).items() if k == "seed" or list_(v) != list_(plain[k])})

    def but(self, **changes: Any) -> Spec:
        """A copy with other choices."""
        return replace(self, **changes)


AXES = ("model", "act", "loss", "data", "loop", "update", "place", "result", "end")


def list_(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load(text: str) -> Spec:
    """The spec of a `dump`."""
    found = json.loads(text)
    return Spec(**{k: tuple(v) if k in LISTS else v for k, v in found.items()})
