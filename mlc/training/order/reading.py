"""What the loss of a level reads: found by running it once, under observation, and putting everything back.

The run is that of :func:`mlc.trace`: the user's function really runs, every tensor from outside that an operator reads
is seen, and afterwards modules, buffers, counters and random generators are as they were.  Which of the reads carry a
derivative is PyTorch's own answer: the leaves that the graph of the loss leads to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload

from mlc.errors import MlcError, TrainingError
from mlc.ir.literals import type_text
from mlc.trace.generators import Generator, is_generator
from mlc.trace.observe import Observation, observe
from mlc.trace.python.changes import place
from mlc.training.level import Level, shape_of
from mlc.training.order.identity import numbers_in

__all__ = ["Reading", "read"]


@dataclass(frozen=True)
class Reading:
    """What one loss reads and changes.

    Attributes:
        level: Whose loss.
        values: Levels whose parameters are read, by its loss or its optimizer (itself among them).
        slopes: Those of them that the derivative of the loss, or of the optimizer's step, leads to.
        free: Leaf tensors that require grad and belong to no level: constants of the training.
        written: Tensors that the loss writes to (running statistics, averages), by their place in the user's code.
        untold: Places of what else it changes, which no state contains (counters in Python).
        generators: Generators of its own that it can draw from: PyTorch's, NumPy's, Python's.
        modules: Modules that it reads.
        ranks: Processes that it communicates with.
        computes: A hash of the operators that ran and of the numbers written in its code.
    """

    level: Level
    values: frozenset[Level]
    slopes: frozenset[Level]
    free: tuple[Tensor, ...]
    written: Mapping[str, Tensor]
    untold: tuple[str, ...]
    generators: tuple[Generator, ...]
    modules: tuple[nn.Module, ...]
    ranks: tuple[int, ...]
    computes: str


def read(level: Level, levels: Sequence[Level]) -> Reading:
    """Run a level's loss once on a batch and see what it reads; nothing of the user's is changed.

    Args:
        level: Whose loss.
        levels: All levels of the training.

    Raises:
        TrainingError: when the loss is no scalar, or is computed from tensors that were made before.
        CaptureError: when mlc cannot represent what it does.
        Exception: what the loss itself raises, with a note that names the level.
    """
    args = (level.feed.peek(),) if level.takes_batch else ()
    try:
        seen = observe(level.loss, args, {})
    except MlcError as e:
        raise type(e)(f"level {level.name!r}: {e.what}", loc=e.loc, advice=e.advice) from e
    except Exception as e:
        e.add_note(f"this is the loss of level {level.name!r}, tried on its first batch to find out what it reads")
        raise
    try:
        return _reading(level, levels, seen)
    finally:
        seen.undo()
        seen.release()


def _reading(level: Level, levels: Sequence[Level], seen: Observation) -> Reading:
    _check_scalar(level, seen.out)
    owner = {id(p): x for x in levels for p in x.params}
    memory = {p.untyped_storage()._cdata: x for x in levels for p in x.params}
    outside = [x.tensor for x in seen.recording.externals]
    leaves = list(_leaves(seen.out))
    _check_leaves(level, outside, owner)
    values = {owner.get(id(t)) or memory.get(t.untyped_storage()._cdata) for t in outside}
    slopes = {owner.get(id(t)) for t in leaves}
    rates = {owner.get(id(t)) for g in level.optimizer.param_groups for t in _hypers(g)}
    free = [t for t in outside if t.requires_grad and t.is_leaf and id(t) not in owner]
    written, untold = _changed(level, seen)
    roots = seen.recording.roots
    held = [g for path, g in roots.objects.items() if is_generator(g) and path[0] != _OTHERS]
    drawn = [g for g, _ in seen.random[0] if g is not None]
    generators = tuple({id(g): g for g in [*held, *drawn]}.values())
    tops = [m for path, m in roots.modules.items() if path[0] != _OTHERS]
    modules = {id(m): m for top in tops for m in top.modules()}
    return Reading(
        level, frozenset(x for x in values | rates if x), frozenset(x for x in slopes | rates if x), tuple(free),
        written, untold, generators, tuple(modules.values()), tuple(seen.recording.circle), _computes(level, seen),
    )  # fmt: skip


def _computes(level: Level, seen: Observation) -> str:
    """What a loss computes, as a hash: the same in another process, whatever its objects are called and hold."""
    words = [numbers_in(level.loss)]
    for e in seen.recording.eqns:
        op = str(e.op) if isinstance(e.op, OpOverload) else type(e.op).__name__
        words.append(f"{op} {[type_text(v.type) for v in e.outs]}")
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


_OTHERS = "function"  # where a walk puts functions of the same code that no path leads to: another training's, say


def _hypers(group: Mapping[str, Any]) -> Iterator[Tensor]:
    """Hyperparameters of a parameter group that are tensors."""
    for key, value in group.items():
        if key != "params":
            yield from (v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Tensor))


def _check_scalar(level: Level, out: Any) -> None:
    if not isinstance(out, Tensor):
        raise level.refuse(f"its loss returned a {type(out).__name__}, no tensor", "return the scalar loss alone")
    if out.numel() != 1:
        raise level.refuse(f"its loss returned {shape_of(out)}, no scalar", "take .mean() or .sum() of it")
    if not out.is_floating_point():
        raise level.refuse(f"its loss is of type {out.dtype}", "a real floating-point loss")


def _leaves(out: Tensor) -> Iterator[Tensor]:
    """Leaves that the graph of a tensor leads to."""
    if out.grad_fn is None:
        if out.requires_grad:
            yield out
        return
    seen, todo = {out.grad_fn}, [out.grad_fn]
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def _check_leaves(level: Level, outside: Sequence[Tensor], owner: Mapping[int, Level]) -> None:
    """Nothing that is read may have been computed from trained parameters before the training."""
    for t in outside:
        if t.grad_fn is None:
            continue
        for leaf in _leaves(t):
            if id(leaf) in owner:
                raise TrainingError(
                    f"level {level.name!r}: its loss reads {shape_of(t)} that was computed from parameters of level "
                    f"{owner[id(leaf)].name!r} before the training, and stays as it is",
                    loc=level.loc, advice="compute it inside the loss",
                )  # fmt: skip


def _changed(level: Level, seen: Observation) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors that the run wrote to, by place, and places of other things that it changed."""
    written: dict[str, Tensor] = {}
    untold: list[str] = []
    names = seen.recording.arg_names
    for e in seen.recording.effects:
        where = place(e.path, names) if e.path else type(e.owner).__name__
        if e.path is not None and e.path[0] == "args":
            raise level.refuse(f"its loss changes its batch, {where}", "work on a copy: batches may come again")
        if e.kind == "copy" and e.path is not None:
            written[where] = e.owner
        elif e.kind != "grad":
            untold.append(where if e.key is None else f"{where}: {e.key}")
    return written, tuple(dict.fromkeys(untold))
