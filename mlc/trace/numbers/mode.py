"""Numbers of a recording in calls of torch: the mode that sees them, active while recording.

:class:`NumberMode` sees each call of torch that has a :class:`~mlc.trace.numbers.number.Number` anywhere in its
arguments, and gives the operator the number's 0-d tensor (:mod:`mlc.trace.numbers.operands`).  Functions of torch that
are written in Python are entered, so that the operators inside them are seen.  What cannot take a tensor (sizes,
dimensions, indices, probabilities) gets the plain number, whose exact value is guarded.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from mlc.trace.numbers.calls import answer, enter
from mlc.trace.numbers.links import living
from mlc.trace.numbers.number import take
from mlc.trace.numbers.operands import DATA, found, leaves

__all__ = ["NumberMode"]

_SCALARS = {"alpha", "value", "beta"}  # where a tensor would become a plain number, and lose its derivative
_CONVERSIONS = {"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__complex__", "__len__", "__get__"}


class NumberMode(TorchFunctionMode):
    """Lets numbers keep their link through torch functions; see the module.

    Args:
        ledger: The recording, told when an operator runs that would take a plain number of a tensor.
    """

    def __init__(self, ledger: Any = None) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: object, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.ledger is None or isinstance(func, types.FunctionType):
            return self._call(func, types_, args, kwargs)
        for name in _SCALARS & kwargs.keys():
            scale = kwargs[name]
            if isinstance(scale, Tensor) and scale.dim() == 0 and not scale.is_complex():
                kwargs = {**kwargs, name: take(scale, self.ledger)}
        before, self.ledger.inside = self.ledger.inside, getattr(func, "__name__", "") not in _CONVERSIONS
        try:
            return self._call(func, types_, args, kwargs)
        finally:
            self.ledger.inside = before

    def _call(self, func: Any, types_: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(func, types.FunctionType):
            return enter(func, types_, args, kwargs, self)
        if (living and found((args, kwargs))) or (func in DATA and _has_tensors(args, kwargs)):
            return answer(func, types_, args, kwargs, self)
        return func(*args, **kwargs)


def _has_tensors(args: Any, kwargs: Any) -> bool:
    """Whether a list of data has tensors in it, which torch reads one by one."""
    lists = [x for x in (*args, *kwargs.values()) if isinstance(x, (list, tuple))]
    return any(isinstance(y, Tensor) for x in lists for y in leaves(x))
