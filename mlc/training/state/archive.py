"""One state in one file that holds no code: a zip of JSON, raw tensors, and a manifest with the hash of each.

``state.json`` is the tree of the state; ``tensors/K`` are the bytes of its tensors in the order of their memory (so
they come back with their strides); ``manifest.json``, written last, names the format, the versions that wrote it, and
SHA-256 of every other entry.  Nothing in it is pickled, and reading runs nothing: every byte is checked against the
manifest before a tensor is made of it.  Any zip tool lists and unpacks such a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from mlc.errors import TrainingError

__all__ = ["Frozen", "load_checkpoint", "read", "write"]

_FORMAT = "mlc checkpoint 1"
_KEY = "~"  # of a JSON object that stands for something else than a dict of texts


@dataclass(frozen=True)
class Frozen:
    """A state as text and tensors; what happens to the training afterwards is nothing to it.

    Attributes:
        tree: The state as JSON, tensors by number.
        tensors: These (the state's own: it must hold copies).
    """

    tree: str
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Frozen:
        """Freeze a state.

        Raises:
            TrainingError: naming the place in the state that no file without code can hold.
        """
        writer = _Writer()
        tree = json.dumps(writer.encoded(dict(state), "state"))
        return cls(tree, tuple(writer.tensors))

    def nbytes(self) -> int:
        """What a file of it needs, about."""
        return len(self.tree) + sum(t.numel() * t.element_size() for t in self.tensors)


class _Writer:
    """Makes JSON of a state, and collects its tensors."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def encoded(self, x: Any, at: str) -> Any:
        if x is None or type(x) in (bool, int, float, str):
            return x
        if isinstance(x, np.generic) and not isinstance(x, np.void):
            return self.encoded(x.item(), at)
        if isinstance(x, Tensor):
            return self.tensor(x, at)
        if type(x) is list:
            return [self.encoded(v, f"{at}[{i}]") for i, v in enumerate(x)]
        if type(x) is dict and _KEY not in x and all(type(k) is str for k in x):
            return {k: self.encoded(v, f"{at}[{k!r}]") for k, v in x.items()}
        return {_KEY: self.other(x, at)}

    def other(self, x: Any, at: str) -> list[Any]:
        """A kind, and what is needed to make it again."""
        kind = type(x)
        if kind in (tuple, set, frozenset, torch.Size):
            return [kind.__name__, [self.encoded(v, f"{at}[{i}]") for i, v in enumerate(x)]]
        if kind in (dict, OrderedDict, Counter):
            return [kind.__name__, [[self.encoded(k, at), self.encoded(v, f"{at}[{k!r}]")] for k, v in x.items()]]
        if kind in (bytes, bytearray):
            return [kind.__name__, list(x)]
        if kind is complex:
            return ["complex", [x.real, x.imag]]
        if kind in (torch.dtype, torch.device):
            return [kind.__name__, str(x).removeprefix("torch.")]
        if isinstance(x, np.ndarray) and x.dtype.kind in "biufc":
            return ["ndarray", self.tensor(torch.from_numpy(np.ascontiguousarray(x)), at), list(x.shape)]
        raise TrainingError(
            f"the state cannot be saved: {at} is a {kind.__name__}",
            advice="tensors, numbers and text alone in the states of callbacks, optimizers and schedulers",
        )

    def tensor(self, t: Tensor, at: str) -> dict[str, Any]:
        if type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided or t.is_quantized:
            raise TrainingError(f"the state cannot be saved: {at} is a {type(t).__name__} of layout {t.layout}")
        t = t.detach().resolve_conj().resolve_neg()
        strides = t.stride()
        order = sorted(range(t.dim()), key=lambda d: (-strides[d], d))
        if not t.permute(order).is_contiguous():
            t, order = t.contiguous(), list(range(t.dim()))
        self.tensors.append(t.permute(order))
        said = [len(self.tensors) - 1, str(t.dtype).removeprefix("torch."), list(t.shape)]
        return {_KEY: ["tensor", *said, *([order] if order != sorted(order) else [])]}


def write(f: IO[bytes], frozen: Frozen, about: Mapping[str, Any]) -> None:
    """Write a state into an open file.

    Args:
        f: The file, opened for writing.
        frozen: The state.
        about: More for the manifest.
    """
    hashes: dict[str, str] = {}
    with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as z:

        def put(name: str, data: Any) -> None:
            hashes[name] = hashlib.sha256(data).hexdigest()
            z.writestr(name, data)

        put("state.json", frozen.tree.encode())
        for k, t in enumerate(frozen.tensors):
            put(f"tensors/{k}", t.cpu().reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
        said = {"format": _FORMAT, "torch": torch.__version__, **about, "sha256": hashes}
        z.writestr("manifest.json", json.dumps(said, indent=1))


def read(path: Path) -> dict[str, Any]:
    """The state in a file; on the CPU.

    Raises:
        ValueError: when it is no whole file of ours.
        OSError: when it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as z:
            manifest = json.loads(z.read("manifest.json"))
            if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
                raise ValueError(f"it is no file of format {_FORMAT!r}")
            hashes = manifest["sha256"]
            held = {name: z.read(name) for name in hashes}
    except OSError:
        raise
    except Exception as e:  # whatever the zip and JSON readers make of other bytes
        raise ValueError(f"it is no whole checkpoint ({str(e) or type(e).__name__})") from e
    wrong = [name for name, data in held.items() if hashlib.sha256(data).hexdigest() != hashes[name]]
    if wrong:
        raise ValueError(f"{wrong[0]} is not what was written")
    state = _decoded(json.loads(held["state.json"]), held)
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError("it is no state of a training")
    return state


def load_checkpoint(path: Any) -> dict[str, Any]:
    """The state in a checkpoint's file, for :meth:`mlc.Training.load_state_dict`; its tensors are on the CPU.

    Raises:
        TrainingError: when there is no such file, or it is not whole.
    """
    try:
        return read(Path(path))
    except (OSError, ValueError) as e:
        raise TrainingError(f"the checkpoint {path} cannot be read: {e}") from e


def _decoded(x: Any, held: Mapping[str, bytes]) -> Any:
    """The reverse of ``encoded``."""
    if isinstance(x, list):
        return [_decoded(v, held) for v in x]
    if not isinstance(x, dict):
        return x
    if _KEY not in x:
        return {k: _decoded(v, held) for k, v in x.items()}
    kind, *rest = x[_KEY]
    if kind == "tensor":
        return _tensor(held, *rest)
    if kind == "ndarray":
        return _decoded(rest[0], held).numpy().reshape(rest[1])
    if kind == "dtype":
        return getattr(torch, rest[0])
    if kind == "complex":
        return complex(*rest[0])
    if kind in ("dict", "OrderedDict", "Counter"):
        pairs = [(_decoded(k, held), _decoded(v, held)) for k, v in rest[0]]
        return _PAIRS[kind](pairs)
    return _PLAIN[kind](_decoded(rest[0], held))


_PAIRS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": lambda pairs: Counter(dict(pairs))}
_PLAIN: dict[str, Any] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "Size": torch.Size, "bytes": bytes, "bytearray": bytearray,
    "device": torch.device,
}  # fmt: skip


def _tensor(held: Mapping[str, bytes], k: int, dtype: str, shape: list[int], order: list[int] | None = None) -> Tensor:
    kind = getattr(torch, dtype)
    order = list(range(len(shape))) if order is None else order
    if not math.prod(shape):
        return torch.empty(shape, dtype=kind)
    flat = torch.frombuffer(bytearray(held[f"tensors/{k}"]), dtype=kind)
    lies = flat.reshape([shape[d] for d in order])
    return lies.permute(sorted(range(len(order)), key=order.__getitem__))
