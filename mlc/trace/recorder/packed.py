"""Packed sequences: what PyTorch's own code reads of their batch sizes, below the operators that are seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mlc.trace.recorder.observer import Observer

__all__ = ["packed"]

_WHAT = "the batch sizes of a packed sequence"


class _Functions:
    """``torch._VF`` with other functions in it."""

    def __init__(self, functions: object, others: dict[str, Callable[..., Any]]) -> None:
        self._functions = functions
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)


def packed(ob: Observer, active: Callable[[], bool]) -> Iterator[tuple[Any, str, Any]]:
    """Later calls must find the batch sizes again that recurrent layers and the padding went by."""
    functions: Any = torch._VF

    def sized(original: Any) -> Any:
        def call(x: Tensor, sizes: Any, *args: Any, **kwargs: object) -> Any:
            if active() and isinstance(sizes, Tensor) and sizes.dtype == torch.int64:
                ob.guard(sizes, sizes.detach().clone(), _WHAT)
            return original(x, sizes, *args, **kwargs)

        return call

    def pad(x: Tensor, sizes: Tensor, *args: object) -> Any:
        out, lengths = sized(functions._pad_packed_sequence)(x, sizes, *args)
        if active():
            with ob.pause():  # they were written where nobody saw it
                lengths = lengths.clone()
            ob.from_outside(lengths, ob.memories.of(lengths), None)
        return out, lengths

    layers = {name: sized(getattr(functions, name)) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
    yield torch.nn.utils.rnn, "_VF", _Functions(functions, {"_pad_packed_sequence": pad})
    yield torch.nn.modules.rnn, "_VF", _Functions(functions, layers)
