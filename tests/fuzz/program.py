"""A generated program as a file, loaded, and run freshly as often as needed.

Everything runs in float64 on one thread. `fresh` is deterministic; a run gets new arguments, and PyTorch's, NumPy's and
Python's generators where every run of that seed starts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import linecache
import random
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.generate import source_of, traits
from tests.fuzz.metas import floats
from tests.fuzz.spec import Spec

NEAR = 0.01  # how far "close by" is

Args = dict[str, Any]
Tensors = dict[str, Tensor]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """float64, one thread, nothing printed, no warnings; all put back."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Program:
    """A spec, its file and the functions in it."""

    spec: Spec
    path: Path
    module: ModuleType

    @property
    def traits(self) -> set[str]:
        """See `tests.fuzz.generate.traits`."""
        return traits(self.spec)

    @property
    def train(self) -> Callable[..., Any]:
        """The training loop."""
        return self.module.train  # type: ignore[no-any-return]

    def fresh(self, run: int, shift: Mapping[str, Tensor] | None = None) -> tuple[Args, Tensors]:
        """Arguments and meta-parameters of a run; `shift` moves the latter.

        Later runs of even seeds have other data; those of odd ones have data close by, so that what the loop decided
        mostly stays and the call is not recorded again.
        """
        close = run if self.spec.seed % 2 and floats(self.spec) else 0
        args, metas = self.module.make(self.spec.seed + (0 if close else 1000 * run), NEAR * close)
        if close:
            with torch.no_grad():
                for t in metas.values():
                    t.mul_(1 + NEAR * close)
        if shift:
            with torch.no_grad():
                for name, delta in shift.items():
                    metas[name].add_(delta)
        start(100 + run)
        return args, metas


def start(seed: int) -> None:
    """All generators at a known place."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def loaded(spec: Spec, folder: Path | None = None) -> Program:
    """Write the file of a spec and import it."""
    folder = Path(tempfile.gettempdir()) / "mlc-fuzz" if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    text = source_of(spec)
    path = folder / f"p{spec.seed}_{zlib.crc32(text.encode()):08x}.py"
    path.write_text(text)
    linecache.checkcache(str(path))
    made = importlib.util.spec_from_file_location(path.stem, path)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return Program(spec, path, module)


def value(out: Any) -> Tensor:
    """The result that is differentiated."""
    if isinstance(out, Tensor):
        return out
    return out["loss"] if isinstance(out, Mapping) else out[0]  # type: ignore[no-any-return]
