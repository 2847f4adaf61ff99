"""A compiled function on many processes: what they agree on when a program is made, before a call and behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlc.errors import CommunicationError, MlcError, PlanError
from mlc.ir.communication.collectives import operator
from mlc.ir.communication.sequence import communicates, fingerprint, sequence
from mlc.ir.digest import digest
from mlc.ir.literals import type_text
from mlc.ir.program import Program
from mlc.passes.cost.rates import Rates, rates, shared_rates
from mlc.runtime.circle import Circle, circle_of, same_sequence
from mlc.runtime.collectives import group_ranks
from mlc.trace.capture import Recording
from mlc.view.plan import Plan

if TYPE_CHECKING:
    from mlc.compiled.entry import Entry

__all__ = ["agreed", "averages", "check_stages", "in_one_process", "mark", "mesh_groups", "plan_together", "world_now"]


def agreed(circle: Circle | None, do: Callable[[], Any]) -> Any:
    """What ``do`` gives, if it succeeds on every process.

    Raises:
        CommunicationError: where it failed on another process only.
    """
    if circle is None:
        return do()
    why: BaseException | None = None
    found = None
    try:
        found = do()
    except CommunicationError:
        raise
    except MlcError as e:
        why = e
    if circle.any(why is not None) and why is None:
        raise CommunicationError(
            "another process of this compiled function refused the call", advice="look at its error"
        )
    if why is not None:
        raise why
    return found


def plan_together(circle: Circle | None, program: Program, make: Callable[[], Plan], on: torch.device,
                  build: Callable[[Plan], Any], passes: Any = None) -> tuple[Plan, Any]:  # fmt: skip
    """A plan, and what is built from it: made by the first process of a circle, and used by all.

    Plans follow from measured rates of a device and from its free memory, which differ from process to process; so
    the first one's rates and its levers are everybody's.

    Raises:
        MlcError: where the first process finds no plan, on every process.
    """
    if circle is None:
        plan = make()
        return plan, build(plan)
    same_sequence(circle, sequence(program.region), "program", program.loc)
    told = Rates.model_validate_json(circle.shared(rates(on).model_dump_json()))
    with shared_rates(told):
        found: Plan | None = None
        text, why = "", None
        if circle.first:
            try:
                found = make()
                text = found.model_dump_json()
            except MlcError as e:
                why, text = e, "!" + e.what
        text = circle.shared(text)
        if why is not None:
            raise why
        if text.startswith("!"):
            raise CommunicationError(f"the first process found no plan: {text[1:]}", loc=program.loc)
        if found is None:
            own = {**json.loads(text), "program": digest(program)}
            found = Plan.model_validate(own).bind(program, passes)
        return found, build(found)


def check_stages(circle: Circle | None, stages: Any, loc: Any) -> None:
    """What the stages communicate must be the same everywhere.

    Raises:
        CommunicationError: where it is not.
    """
    if circle is not None:
        for name in ("forward", "backward"):
            region = getattr(stages, name)
            same_sequence(circle, [] if region is None else sequence(region), f"{name} stage", loc)


def mark(entry: Entry | None, lengths: Sequence[int]) -> int:
    """A number that is the same where processes may use these recordings together; 0: there is none."""
    if entry is None:
        return 0
    said = [str(n) for n in lengths]
    for region in (entry.executor.stages.forward, entry.executor.stages.backward):
        said += [] if region is None else [text for text, _ in sequence(region)]
    return fingerprint(said) or 1


def world_now() -> tuple[int, int] | None:
    """The rank of this process and the number of processes; None without ``torch.distributed``."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else None


# ---- averages over processes


def mesh_groups(mesh: Any) -> list[Any]:
    """One group for each dimension of a mesh.

    Raises:
        PlanError: where this process is not in it.
    """
    if mesh is not None and mesh.get_coordinate() is None:
        raise PlanError("this process is not in the mesh", advice="compile without mesh= on processes outside of it")
    return [mesh.get_group(d) for d in range(mesh.ndim)] if mesh is not None else []


def averages(recording: Recording, mesh: Any) -> dict[int, list[str]]:
    """Names of the groups that the gradient of an input is averaged over, by the input's position."""
    over = [g.group_name for g in mesh_groups(mesh)]
    out: dict[int, list[str]] = {}
    for i, x in enumerate(recording.externals):
        ddp = recording.averaged.get(id(x.tensor))
        names = [*over, *([ddp] if ddp is not None and ddp not in over else [])]
        if names:
            out[i] = names
    return out


def averaged(entry: Entry, found: dict[int, Tensor], inputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """Gradients by position of the input, those that are to be averaged averaged (one without a path counts as zero).

    Raises:
        CommunicationError: where the processes do not average the same.
    """
    if not entry.averages:
        return found
    names = {i: entry.program.inputs[i].name for i in entry.program.metas if i in entry.averages}
    order = sorted(names, key=lambda i: names[i])
    _compared(entry, order, names)
    out = dict(found)
    for i in order:
        mean = found[i] if i in found else torch.zeros_like(inputs[i])
        for group in entry.averages[i]:
            mean = operator("all_reduce")(mean, "avg", group)
        out[i] = mean
    return out


def _compared(entry: Entry, order: Sequence[int], names: dict[int, str]) -> None:
    """Every process of a group averages gradients of the same names and types over it."""
    region = entry.program.region
    for group in sorted({g for i in order for g in entry.averages[i]}):
        circle = circle_of(group_ranks(group))
        if circle is None:
            continue
        said = [f"{names[i]}: {type_text(region.inputs[i].type)}" for i in order if group in entry.averages[i]]
        if circle.alike(fingerprint(said)):
            continue
        every = circle.told("; ".join(said))
        rank, other = next((r, t) for r, t in zip(circle.ranks, every, strict=True) if t != "; ".join(said))
        raise CommunicationError(
            f"hypergradients are averaged, but processes have different meta-parameters: {'; '.join(said)} here, "
            f"{other} on rank {rank}", loc=entry.program.loc,
            advice="give every process the same meta-parameters, under the same names",
        )  # fmt: skip


def in_one_process(program: Program) -> None:
    """Refuse what cannot be done for one process alone.

    Raises:
        CommunicationError: for a program that communicates with other processes.
    """
    now = world_now()
    if now is not None and now[1] > 1 and communicates(program.region):
        raise CommunicationError(
            "a loop that communicates cannot be checked here", loc=program.loc,
            advice="run the check in one process (a world of size 1), on the union of the data",
        )  # fmt: skip
