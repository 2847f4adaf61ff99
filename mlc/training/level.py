"""One problem of a multilevel training: :class:`Level`, what it trains, by which loss, with which optimizer.

A level is checked when it is made, and every refusal names it and its line.  What its loss reads of *other* levels is
found later (:mod:`mlc.training.order.reading`): here a level stands for itself.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mlc.errors import TrainingError
from mlc.ir.lowered.responses import Evolution
from mlc.ir.types import Loc
from mlc.trace.python.frames import is_user_code
from mlc.training.data.feed import Feed

__all__ = ["Level"]


class Level:
    """What one optimizer trains by one loss, inside a :class:`~mlc.training.engine.Training`.

    ``loss(batch)`` is an ordinary function that returns a scalar.  It reads modules and tensors by closure, those of
    other levels too: which ones is found, and with them where derivatives go.

    Attributes:
        name: Of the level; unique in a training. Losses are logged under it.
        params: The leaf tensors that it trains (those of the given ones that require grad), in order.
        optimizer: Trains exactly these.
        scheduler: Of the optimizer, or None.
        steps: Optimizer steps for each step of the level above.
        loc: The user's line that made it.
    """

    def __init__(self, name: str, params: Any, optimizer: Any, loss: Callable[..., Any], data: Any = None,
                 steps: int = 1, *, response: Any = None, start: str = "warm", rollback: bool = False,
                 scheduler: Any = None, clip: Any = None, accumulate: int = 1,
                 precision: Any = None) -> None:  # fmt: skip
        """Check and hold.

        Args:
            name: Of the level.
            params: What it trains: a module, a tensor, tensors (``model.parameters()``), or parameter groups (dicts).
            optimizer: A ``torch.optim.Optimizer`` over exactly ``params``, or what makes one from them
                (``lambda p: torch.optim.Adam(p, lr=1e-3)``; it is handed the groups where groups were given).
            loss: ``loss(batch)`` to a scalar tensor; ``loss()`` where it takes nothing.
            data: Batches: a list of them, a ``DataLoader`` or other iterable that can be iterated again, or a
                generator function; each starts over when it ends. None: the loss gets ``None``, or nothing.
            steps: Optimizer steps for each step of the level above; of the top level always 1.
            response: How the levels above differentiate what this one trained: None or ``mlc.Unroll()``, exactly
                through all steps; or another response (``mlc.Implicit()``, ``mlc.Truncated(5)``, ...).
            start: ``"warm"``: every step of the level above goes on from where the last one left this level;
                ``"cold"``: it starts anew from the parameters, optimizer and scheduler of the beginning (inside the
                loop of another level: with a fresh optimizer).
            rollback: After the step of the level above, go back to before this level's steps and take them again, on
                the same batches, with the new parameters above (DARTS, Liu et al. 2019, algorithm 1).
            scheduler: An ``LRScheduler`` of the optimizer, or what makes one from it; steps after every optimizer step.
            clip: Largest 2-norm of the level's whole gradient (``torch.nn.utils.clip_grad_norm_``), or a function of
                the list of parameters that changes their ``.grad`` in place. It is part of what is differentiated.
            accumulate: Batches per optimizer step; the loss is their mean.
            precision: Of this level in the compiled program, as for ``mlc.compile(precision=...)``.

        Raises:
            TrainingError: for anything that does not fit together, with the level's name and line.
        """
        self.loc = _user_line()
        if not isinstance(name, str) or not name.strip() or "\n" in name:
            raise TrainingError(f"the name of a level is {name!r}", loc=self.loc, advice='a short text: "inner"')
        self.name = name
        self.params, groups = self._tensors(params)
        self.optimizer = self._optimizer(optimizer, groups)
        self.loss = self._callable(loss)
        self.feed = Feed(self.refuse, data)
        if self.feed.given and not self.takes_batch:
            raise self.refuse("it has data, but its loss takes no batch", "def loss(batch): ...")
        self.steps = self._count("steps", steps)
        self.accumulate = self._count("accumulate", accumulate)
        if start not in ("warm", "cold"):
            raise self.refuse(f"start={start!r}", 'start="warm" or start="cold"')
        self.cold = start == "cold"
        self.rollback = self._flag("rollback", rollback)
        if self.cold and self.rollback:
            raise self.refuse(
                "a cold start and rollback exclude each other", 'leave one out: start="cold" always returns'
            )
        self.scheduler = self._scheduler(scheduler)
        self.clip = self._clip(clip)
        self.response = self._response(response)
        self.precision = precision

    def __repr__(self) -> str:
        return f"Level({self.name!r}, {len(self.params)} tensors, {type(self.optimizer).__name__}, steps={self.steps})"

    def refuse(self, what: str, advice: str = "") -> TrainingError:
        """An error about this level."""
        return TrainingError(f"level {self.name!r}: {what}", loc=self.loc, advice=advice)

    @property
    def takes_batch(self) -> bool:
        """Whether the loss is called with a batch."""
        return self._arity != 0

    # ---- checks

    def _response(self, response: Any) -> Any:
        if isinstance(response, (str, type, int, float)):
            given = response.__name__ if isinstance(response, type) else repr(response)
            raise self.refuse(f"response={given}", 'a response: mlc.Implicit("cg"), mlc.Truncated(5), ...')
        if isinstance(response, Evolution) and response.persistent and (self.cold or self.rollback):
            how = "a cold start" if self.cold else "rollback"
            raise self.refuse(
                f"{response} beside {how}", 'start="warm" without rollback: every step is a window of one long training'
            )
        return response

    def _tensors(self, params: Any) -> tuple[list[Tensor], list[Any]]:
        """The trained tensors, and what an optimizer is made from (tensors or groups)."""
        if isinstance(params, nn.Module):
            given: list[Any] = list(params.parameters())
        elif isinstance(params, Tensor):
            given = [params]
        elif isinstance(params, Iterable) and not isinstance(params, (str, bytes, dict)):
            given = list(params)
        else:
            raise self.refuse(
                f"params are {_kind(params)}", "model.parameters(), a list of tensors, or parameter groups"
            )
        flat: list[Any] = []
        for g in given:
            inside = g.get("params", ()) if isinstance(g, dict) else g
            flat += [inside] if isinstance(inside, Tensor) else list(inside) if isinstance(g, dict) else [inside]
        for i, p in enumerate(flat):
            if isinstance(p, (tuple, list)) and len(p) == 2 and isinstance(p[1], Tensor):
                raise self.refuse("params are pairs of names and tensors", "model.parameters()")
            if not isinstance(p, Tensor):
                raise self.refuse(f"params[{i}] is {_kind(p)}, no tensor", "model.parameters()")
            if not p.is_leaf:
                raise self.refuse(
                    f"params[{i}], of shape {tuple(p.shape)}, is computed from other tensors and cannot be trained",
                    "train the tensors it is computed from, and compute it inside the loss",
                )
        trained = list({id(p): p for p in flat if p.requires_grad}.values())
        if not trained:
            what = "none of its params requires grad" if flat else "it has no params"
            raise self.refuse(what, "requires_grad_(), or leave the level out")
        return trained, given

    def _optimizer(self, given: Any, groups: list[Any]) -> Optimizer:
        made = given
        if not isinstance(given, Optimizer):
            if not callable(given):
                raise self.refuse(f"optimizer is {_kind(given)}", "torch.optim.Adam(params), or a function of params")
            made = given(groups)
        if not isinstance(made, Optimizer):
            raise self.refuse(f"the optimizer function returned {_kind(made)}", "return a torch.optim.Optimizer")
        if isinstance(made, LBFGS):
            raise self.refuse("LBFGS evaluates the loss several times in a step", "another optimizer")
        held = {id(p): p for g in made.param_groups for p in g["params"] if p.requires_grad}
        missing = [p for p in self.params if id(p) not in held]
        extra = [p for key, p in held.items() if key not in {id(p) for p in self.params}]
        for found, what in (
            (missing, "is not in its optimizer"),
            (extra, "is in its optimizer, but not in its params"),
        ):
            if found:
                raise self.refuse(
                    f"a tensor of shape {tuple(found[0].shape)} {what} ({len(found)} in all)",
                    "give the level and its optimizer the same parameters",
                )
        return made

    def _callable(self, loss: Any) -> Callable[..., Any]:
        if not callable(loss):
            raise self.refuse(f"loss is {_kind(loss)}", "a function of a batch: def loss(batch): ...")
        self._arity = 1
        given: Callable[..., Any] = loss
        try:
            parameters = inspect.signature(loss).parameters.values()
        except (TypeError, ValueError):
            return given
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = [p for p in positional if p.default is p.empty]
        if len(needed) > 1 or any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
            names = ", ".join(p.name for p in needed)
            raise self.refuse(f"its loss takes more than a batch: ({names})", "def loss(batch): x, y = batch; ...")
        if not positional and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            self._arity = 0
        return given

    def _count(self, what: str, n: Any) -> int:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise self.refuse(f"{what}={n!r}", "a whole number from 1 on")
        return n

    def _flag(self, what: str, x: Any) -> bool:
        if not isinstance(x, bool):
            raise self.refuse(f"{what}={x!r}", "True or False")
        return x

    def _scheduler(self, given: Any) -> LRScheduler | None:
        if given is None:
            return None
        made = given
        if not isinstance(given, (LRScheduler, ReduceLROnPlateau)):
            if not callable(given):
                raise self.refuse(f"scheduler is {_kind(given)}", "an LRScheduler, or a function of the optimizer")
            made = given(self.optimizer)
        if isinstance(made, ReduceLROnPlateau):
            raise self.refuse(
                "ReduceLROnPlateau steps by a measured value", "step it in a callback, where you have one"
            )
        if not isinstance(made, LRScheduler):
            raise self.refuse(f"the scheduler function returned {_kind(made)}", "return an LRScheduler")
        if made.optimizer is not self.optimizer:
            raise self.refuse("its scheduler belongs to another optimizer", "make it from this level's optimizer")
        return made

    def _clip(self, clip: Any) -> Any:
        if clip is None or callable(clip):
            return clip
        if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not math.isfinite(clip) or clip <= 0:
            raise self.refuse(f"clip={clip!r}", "the largest norm, a number above 0, or a function of the parameters")
        return float(clip)


def _kind(x: Any) -> str:
    return "None" if x is None else f"a {type(x).__name__}"


def _user_line() -> Loc | None:
    """The innermost line of the user's that is running."""
    f = sys._getframe(1)
    while f is not None and not is_user_code(f.f_code):
        f = f.f_back  # type: ignore[assignment]
    return None if f is None else Loc(f.f_code.co_filename, f.f_lineno, f.f_code.co_name)


def shape_of(t: torch.Tensor) -> str:
    """A tensor, for messages."""
    return f"a tensor of shape {tuple(t.shape)}"
