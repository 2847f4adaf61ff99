"""Loop forms: how the steps follow each other.

Traits name what they run over: `items` (anything that can be iterated), `again` (several times), `indexed` (a length
and indices) or `steps` (the number of the step).
"""

from __future__ import annotations

from tests.fuzz.draft import Draft
from tests.fuzz.piece import Axis
from tests.fuzz.spec import Spec

LOOPS = Axis("loop")


def enough(name: str, spec: Spec) -> bool:
    """Whether `next` finds as many items as it is called for."""
    fewer = spec.data == "split_randomly"
    return not (name == "nexted" and fewer) and not (name == "epochs_next" and (fewer or spec.steps < 2))


def looped(name: str, headers: list[str], traits: str, weight: float = 1.0, **places: str) -> None:
    """`places` are lines: `setup`, `bind` (first in the body), `tail` (last in it); `index` is the counter's name."""

    def write(d: Draft) -> None:
        fill = {"steps": d.spec.steps, "half": max(1, d.spec.steps // 2), "total": 2 * d.spec.steps - 1}
        d.loops += [h.format(**fill) for h in headers]
        d.late += [places["setup"].format(**fill)] if "setup" in places else []
        d.bind[:0] = [places["bind"].format(**fill)] if "bind" in places else []
        d.tail += [places["tail"].format(**fill)] if "tail" in places else []
        d.index = places.get("index")
        d.twice = "twice" in traits

    LOOPS.put(name, write, traits, weight=weight, fits=lambda spec: enough(name, spec))


looped("for_", ["for item in data:"], "items", 3)
looped("enumerated", ["for k, item in enumerate(data):"], "items", 2, index="k")
looped("zipped", ["for j, item in zip(range({steps}), data):"], "items", index="j")
looped("epochs", ["for epoch in range(2):", "for item in data:"], "again", 3)
looped(
    "epochs_next",
    ["for epoch in range(2):", "for step in range({half}):"],
    "again",
    bind="item = next(batches)",
    setup="batches = iter(data)",
)
looped(
    "epochs_break",
    ["for epoch in range(2):", "for item in data:"],
    "again",
    1,
    setup="seen = 0",
    tail="seen += 1\nif seen >= {total}:\n    break",
)
looped("two_loops", ["for item in data:"], "again twice", 2)
looped("ranged", ["for k in range(len(data)):"], "indexed", 2, bind="item = data[k]", index="k")
looped("while_", ["while k < len(data):"], "indexed", 2, bind="item = data[k]", setup="k = 0", tail="k += 1", index="k")
looped("reversed_", ["for k in reversed(range(len(data))):"], "indexed", 1, bind="item = data[k]", index="k")
looped("cycled", ["for k in range({total}):"], "indexed", 1, bind="item = data[k % len(data)]", index="k")
looped(
    "nexted",
    ["for k in range({steps}):"],
    "items",
    1,
    bind="item = next(batches)",
    setup="batches = iter(data)",
    index="k",
)
looped("steps", ["for i in range({steps}):"], "steps", 3, index="i")
looped("steps_epochs", ["for epoch in range(2):", "for i in range({steps}):"], "steps", 2)
looped("steps_while", ["while i < {steps}:"], "steps", 2, setup="i = 0", tail="i += 1", index="i")

# Which loops can run over which data.
RUNS = {
    "items": {"list", "many", "once"},
    "again": {"many"},
    "indexed": {"list"},
    "steps": {"index"},
}


def runs_over(loop: str, traits: frozenset[str]) -> bool:
    """Whether a loop can run over data of these traits."""
    (kind,) = LOOPS[loop].traits & RUNS.keys()
    return bool(RUNS[kind] & traits)
