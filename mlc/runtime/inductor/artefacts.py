"""Artefacts: a segment compiled by Inductor, kept on disk between processes.

What is kept is the Python source that Inductor generates, under the hash of everything that it depends on: the
segment's structure, PyTorch, the number of threads (it is written into the kernels) and this module's version.  The
kernels inside are compiled and cached by Inductor itself.  Both live in Inductor's cache folder, so that
``TORCHINDUCTOR_CACHE_DIR`` moves them and deleting that folder forgets them.

Segments go to Inductor as functional ATen graphs without guards: shapes and strides are those of the segment's types,
and the caller sees to it that tensors lie so.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mlc.ir.core import Region, SafeSqrt, map_vars
from mlc.ir.types import TensorType

__all__ = ["Counts", "build", "counts", "evaluate", "folder", "known"]

FORMAT = 1
_A: Any = torch.ops.aten

Boxed = Callable[[list[Any]], Sequence[Tensor]]


class Counts:
    """What this process did, for reports and tests: segments compiled, artefacts read from disk."""

    compiled = 0
    loaded = 0


counts = Counts()


def folder() -> Path:
    """Where artefacts are kept; made when missing."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = Path(cache_dir()) / "mlc"
    path.mkdir(parents=True, exist_ok=True)
    return path


def build(key: str, body: Region) -> Boxed:
    """A callable ``list -> results`` for the segment, from disk or compiled; the list is emptied by the call.

    Args:
        key: Text that determines the segment (:func:`mlc.runtime.inductor.segments.key_of`).
        body: The segment.

    Raises:
        Exception: whatever Inductor or the C++ compiler raise.
    """
    path = _path(key)
    if path.exists():
        call = _load(path)
        counts.loaded += 1
        return call
    code = _compile(body)
    counts.compiled += 1
    if not code.constants:  # constant tensors are not part of the source
        _write(path, code.source_code)
    call = code.current_callable
    assert call is not None
    return call  # type: ignore[no-any-return]


def known(key: str) -> bool:
    """Whether the segment's artefact is on disk."""
    return _path(key).exists()


def _path(key: str) -> Path:
    digest = hashlib.sha256("\n".join([*_surroundings(), key]).encode()).hexdigest()
    return folder() / digest[:2] / f"mlc_{digest}.py"


@functools.cache
def _machine() -> str:
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{pick_vec_isa()} {cards}"


def _surroundings() -> list[str]:
    """What the generated source depends on besides the segment."""
    return [f"mlc artefact {FORMAT}", torch.__version__, _machine(), f"{torch.get_num_threads()} threads"]


def _write(path: Path, text: str) -> None:
    """All or nothing: another process may write the same."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _load(path: Path) -> Boxed:
    from torch._inductor.codecache import PyCodeCache

    module: Any = PyCodeCache.load_by_key_path(path.stem, str(path))
    return module.call  # type: ignore[no-any-return]


def _compile(body: Region) -> Any:
    """The segment through Inductor; ``size_asserts`` are the caller's (who can copy instead of failing)."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner, record_original_output_strides
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    with mode:
        args = [_fake(v.type) for v in body.inputs]
    graph = _traced(body, mode, args)
    output = next(iter(reversed(graph.graph.nodes)))
    output.meta["user_visible_output_idxs"] = list(range(len(body.outputs)))  # these keep their strides
    record_original_output_strides(graph)
    settings = {"size_asserts": False, "alignment_asserts": False, "freezing": False, "cpp_wrapper": False}
    with torch.no_grad(), tracing(TracingContext(mode)), V.set_fake_mode(mode), config.patch(settings):
        return compile_fx_inner(graph, args, is_inference=True)


def _fake(t: Any) -> Tensor:
    assert isinstance(t, TensorType)
    return torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device=t.device)


def _traced(body: Region, mode: Any, args: list[Tensor]) -> fx.GraphModule:
    """The segment in the operators that Inductor knows."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(*values: Tensor) -> list[Tensor]:
        return evaluate(body, values)

    with torch.no_grad(), mode:
        graph: fx.GraphModule = make_fx(run, decomposition_table=select_decomp_table())(*args)
    return graph


def evaluate(body: Region, values: Sequence[Tensor]) -> list[Tensor]:
    """The segment operator by operator, on tensors of any dtype, fake or real."""
    env: dict[Any, Any] = dict(zip(body.inputs, values, strict=True))
    for e in body.eqns:
        op = _A.sqrt.default if isinstance(e.op, SafeSqrt) else _RESHAPED.get(e.op, e.op)
        args = map_vars(e.args, env.__getitem__)
        found = op(*args, **{k: map_vars(x, env.__getitem__) for k, x in e.kwargs})
        results = [found] if isinstance(found, Tensor) else _flat(found)
        env.update(zip(e.outs, results, strict=True))
    return [env[v] for v in body.outputs]


# A view that fits the recorded strides need not fit those at hand.
_RESHAPED: dict[Any, Any] = {_A.view.default: _A.reshape.default, _A._unsafe_view.default: _A.reshape.default}


def _flat(found: Any) -> list[Tensor]:
    out: list[Tensor] = []
    for x in found:
        out += _flat(x) if isinstance(x, list | tuple) else [] if x is None else [x]
    return out
