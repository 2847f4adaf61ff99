"""Loops that must be refused, and what a good message is.

A loop marks the line to be named with a comment `# <here>`. Where several lines are fair to blame (a scaler
is made, used and stepped), all of them are marked and one must be named. A loop without a mark may be blamed
anywhere in its body. `names` is a pattern that the message must contain, so that it is about the right thing.
"""

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.numerics.models import task, train_loss
from tests.numerics.program import describe, same

ADVICE = re.compile(
    r"\b(use|try|write|instead|move|call|pass|put|replace|remove|make|drop|set|take|return|without|outside)\b"
)


@dataclass(frozen=True)
class Refused:
    """A loop that must be refused, and a word of the message."""

    loop: Callable[..., Any]
    names: str
    model: Callable[[], nn.Module] | None = None
    also: tuple[Any, ...] = ()

    def lines(self) -> set[int]:
        """Lines of the test's file that the message may name."""
        marked: set[int] = set()
        for part in (self.loop, *self.also):
            source, start = inspect.getsourcelines(part)
            marked |= {start + i for i, line in enumerate(source) if "# <here>" in line}
        source, start = inspect.getsourcelines(self.loop)
        return marked or set(range(start, start + len(source)))

    @property
    def file(self) -> str:
        return Path(inspect.getfile(self.loop)).name

    def args(self) -> dict[str, Any]:
        args = task().args()
        return {**args, "model": self.model()} if self.model else args


class Refusals(list[Refused]):
    """The loops of one test module, collected by decorating them."""

    def add(self, names: str, *also: Any, model: Callable[[], nn.Module] | None = None) -> Callable[..., Any]:
        """`also` are helpers of the test's file whose marked lines count too."""

        def keep(loop: Callable[..., Any]) -> Callable[..., Any]:
            self.append(Refused(loop, names, model, also))
            return loop

        return keep


def check_refused(case: Refused, mlc: ModuleType) -> None:
    """The right error, and nothing of the user's moved."""
    args = case.args()
    before = {n: copy.deepcopy(describe(args[n])) for n in ("model", "meta")}
    with pytest.raises(mlc.MlcError) as error:
        mlc.compile(case.loop)(**args)
    check_message(str(error.value), case.file, case.lines(), case.names)
    for n, kept in before.items():
        same(describe(args[n]), kept, n)


def check_message(message: str, file: str, lines: set[int], names: str) -> None:
    named = {int(n) for n in re.findall(rf'{file}"?(?::|, line )(\d+)', message)}
    assert named, f"no line of {file} in: {message}"
    assert named & lines, f"names line {named}, expected one of {sorted(lines)}: {message}"
    assert re.search(names, message, re.IGNORECASE), f"does not say {names!r}: {message}"
    assert ADVICE.search(message.lower()), f"no advice in: {message}"


def step(model: Any, meta: Any, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One ordinary step; returns the loss."""
    opt.zero_grad()
    loss = train_loss(model, meta, x, y)
    loss.backward()
    opt.step()
    return loss
