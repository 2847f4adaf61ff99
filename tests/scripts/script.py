"""A training script as a test case: how its arguments are made, what is learned about it, and how it is judged.

`main(**make())` is the script: it trains and returns the validation loss. Beside the loss it may leave anything that a
real script leaves: trained modules and optimizers among its arguments, meters, printed lines, files in the working
folder. A script's module is ordinary PyTorch; above the one line that a meta-parameter changes stands
`# was: <the ordinary line>`, and a test puts the ordinary line back.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Script:
    """One script.

    Attributes:
        name: What it is called in the tests.
        main: The script, one function.
        make: Its arguments, made afresh from torch's generator; nothing of one run reaches another.
        metas: The tensors among the arguments that the loss is differentiated with respect to.
        loss: The loss among what `main` returns.
        options: How it is compiled, where not by default. `stop_gradient="inner"` where its inner losses read detached
            values: central differences see through every cut.
        tol: Relative error allowed between the gradient and central differences.
        values: Relative error allowed between a compiled call's values and eager's.
        frozen: A function of the script's module that cuts. Differences are then taken with what it gave at the unmoved
            meta-parameters, which is what `stop_gradient="all"` means where a loss reads a cut value.
        slow: Whether its compiled test takes more than about 8 s.
        needs: Third-party packages without which it is skipped.
    """

    name: str
    main: Callable[..., Any]
    make: Callable[[], Arguments]
    metas: Callable[[Arguments], dict[str, Tensor]]
    loss: Callable[[Any], Tensor] = lambda out: out
    options: Mapping[str, Any] = field(default_factory=dict)
    tol: float = 1e-5
    values: float = 1e-9
    frozen: str = ""
    slow: bool = False
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return [package for package in self.needs if find_spec(package) is None]

    @cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(self.main.__module__)

    @cached_property
    def source(self) -> str:
        return Path(str(self.module.__file__)).read_text()

    def ordinary(self) -> "Script":
        """The script before mlc: what stands behind `# was:` put in the place of the line after it."""
        lines: list[str] = []
        changed = False
        for line in self.source.splitlines():
            indent, mark, was = line.partition("# was: ")
            if mark:
                lines.append(indent + was)
            elif not changed:
                lines.append(line)
            changed = bool(mark)
        names: dict[str, Any] = {"__name__": self.main.__module__ + ".ordinary"}
        exec(compile("\n".join(lines), f"{self.name} before mlc", "exec"), names)
        return Script(self.name, names[self.main.__name__], names[self.make.__name__], self.metas, self.loss)
