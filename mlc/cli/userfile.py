"""Files that the command line works on: what they define, and how they are imported.

The convention is that of ``examples/README.md``: one or more functions compiled by :func:`mlc.compile`,
``example_args()`` with small arguments for it, and ``main()`` if there is something to run.  A file of levels defines
``example_training()`` instead, which returns a small :class:`mlc.Training`; its step is the function that is meant.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlc.compiled.compiled import CompiledFunction
from mlc.errors import MlcError
from mlc.trace.python.frames import is_user_code
from mlc.training.engine import Training

__all__ = ["UserFile", "blame", "load"]


@dataclass(frozen=True)
class UserFile:
    """An imported file and the function in it that is meant.

    Attributes:
        path: The file.
        module: The module it became.
        name: The name asked for after the colon, None without one.
    """

    path: Path
    module: ModuleType
    name: str | None = None

    @property
    def compiled(self) -> dict[str, CompiledFunction]:
        """Every compiled function at the top level, in the order of definition."""
        return {k: v for k, v in vars(self.module).items() if isinstance(v, CompiledFunction)}

    @functools.cached_property
    def training(self) -> Training | None:
        """What ``example_training()`` returns, where a file has no compiled function and no arguments of its own.

        Raises:
            MlcError: when that is no training.
        """
        make = getattr(self.module, "example_training", None)
        if self.name is not None or self.compiled or not callable(make):
            return None
        found = make()
        if not isinstance(found, Training):
            raise MlcError(
                f"example_training() of {self.path} returns a {type(found).__name__}", advice="return an mlc.Training"
            )
        return found

    @property
    def main(self) -> Callable[[], Any] | None:
        """``main``, if the file defines it."""
        main = getattr(self.module, "main", None)
        return main if callable(main) else None

    def function(self) -> Any:
        """The function that is meant: the named one, else the first compiled one.

        Raises:
            MlcError: when there is none.
        """
        if self.name is not None:
            found = getattr(self.module, self.name, None)
            if not callable(found):
                names = ", ".join(self.compiled) or "none"
                raise MlcError(
                    f"{self.path} has no function {self.name!r}", advice=f"one of its compiled ones: {names}"
                )
            return found
        if self.training is not None:
            return self.training.function
        if not self.compiled:
            raise MlcError(
                f"{self.path} defines no compiled function at its top level",
                advice="decorate the function with @mlc.compile, or name one: FILE.py:function",
            )
        return next(iter(self.compiled.values()))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What ``example_args()`` returns, as positional and keyword arguments.

        Raises:
            MlcError: when it is missing or returns something else.
        """
        if self.training is not None:
            return self.training.arguments(), {}
        make = getattr(self.module, "example_args", None)
        if not callable(make):
            raise MlcError(
                f"{self.path} defines no example_args()",
                advice="add `def example_args()` that returns a tuple (or dict) of small arguments",
            )
        found = make()
        if isinstance(found, dict):
            return (), found
        if isinstance(found, (tuple, list)):
            return tuple(found), {}
        raise MlcError(
            f"example_args() of {self.path} returns a {type(found).__name__}",
            advice="return a tuple or a dict",
        )


def load(target: str) -> UserFile:
    """Import ``FILE.py`` or ``FILE.py:function``.

    The module is registered under the name of the file, with its folder first on the path, as Python does for
    a script: dataclasses, pickle and processes of DataLoaders find it again.

    Raises:
        MlcError: when there is no such file.
    """
    file, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier():
        file, name = target, ""
    path = Path(file)
    if not path.is_file():
        raise MlcError(f"no file {file}", advice="mlc COMMAND FILE.py or FILE.py:function")
    path = path.resolve()
    known = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    title = f"_mlc_{path.stem}" if known or not path.stem.isidentifier() else path.stem
    spec = importlib.util.spec_from_file_location(title, path)
    if spec is None or spec.loader is None:
        raise MlcError(f"{file} is not a Python file", advice="give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path)]
    spec.loader.exec_module(module)
    return UserFile(path, module, name or None)


def blame(error: BaseException) -> str:
    """One line for an exception that is not ours: what, and the last line of the user's that it passed."""
    what = "".join(traceback.format_exception_only(error)).strip()
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__) if is_user_code(f.f_code)]
    lines = [n for f, n in traceback.walk_tb(error.__traceback__) if is_user_code(f.f_code)]
    if not frames or isinstance(error, SyntaxError):
        return what
    code = frames[-1].f_code
    return f"{what}\n  at {code.co_filename}:{lines[-1]} in {code.co_name}"
