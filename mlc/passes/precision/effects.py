"""What a policy came to in a plan, in words: what computes narrowly, what is stored, what has no effect and why."""

from __future__ import annotations

from dataclasses import dataclass

from mlc.ir.lowered.precision import Resolved
from mlc.ir.lowered.stages import Stages
from mlc.ir.program import Level, Program
from mlc.passes.cost.equations import device_of
from mlc.passes.precision.casts import Casts, casts_of, narrow_products
from mlc.passes.precision.store import labels, saved_bytes
from mlc.units import size_text

__all__ = ["Effect", "effects"]


@dataclass(frozen=True)
class Effect:
    """One sentence about a policy: of what, what was done, why; bytes of what is stored where that is its subject."""

    subject: str
    choice: str
    reason: str
    bytes: int | None = None


def effects(program: Program, policy: Resolved, stages: Stages, mode: str) -> list[Effect]:
    """One entry for each level that computes, updates or stores by a policy.

    Args:
        program: The program.
        policy: The policy.
        stages: The lowered program.
        mode: How derivatives go.
    """
    found: list[Effect] = []
    casts = casts_of(program, policy)
    saved = saved_bytes(stages.forward)
    for level in program.levels:
        if level.name in policy.compute or level.name in policy.product:
            found.append(_computed(program, level, policy, casts))
        if level.name in policy.update:
            found.append(Effect(f"update of {level.name}", policy.update[level.name], "asked for"))
        if level.name in policy.store:
            found.append(_stored(program, level, policy, saved, mode))
    if policy.matmul:
        where = device_of(stages.forward).type
        why = "asked for; while compiled stages run" if where == "cuda" else f"no effect on a {where.upper()}"
        found.append(Effect("matrix products", policy.matmul, why))
    return found


def _computed(program: Program, level: Level, policy: Resolved, casts: Casts | None) -> Effect:
    loss, product = (named.get(level.name, "float32") for named in (policy.compute, policy.product))
    how = loss if loss == product or not level.at else f"loss {loss}, product {product}"
    either = casts
    if casts is not None and level.name not in policy.compute:
        either = Casts(casts.products, casts.products)
    narrow, total = narrow_products(program, level, either)
    if not total:
        return Effect(f"precision of {level.name}", how, "asked for, but there is no matrix product in it: all float32")
    return Effect(f"precision of {level.name}", how, f"asked for; {narrow} of {total} matrix products")


def _stored(program: Program, level: Level, policy: Resolved, saved: dict[str, tuple[int, int]], mode: str) -> Effect:
    kinds = policy.store[level.name]
    how = ", ".join(f"{kind} {dtype}" for kind, dtype in kinds.items())
    if len(set(kinds.values())) == 1 and len(kinds) > 1:
        how = next(iter(kinds.values()))
    sizes = [saved[x] for x in labels(program, level) if x in saved]
    if not sizes:
        why = "nothing is kept on the way" if mode == "forward" else "no such value is kept at every step"
        return Effect(f"saved by {level.name}", how, f"asked for, but {why}")
    before, after = (sum(x) for x in zip(*sizes, strict=True))
    return Effect(f"saved by {level.name}", how, f"asked for; in place of {size_text(before)}", after)
