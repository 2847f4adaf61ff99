"""What a precision policy costs: the hypergradient under it beside the exact one of the same check.

The policy is over float32 values, so the function runs a second time on copies whose types are left as they are; the
reference is the gradient that was examined, in float64.  Where the loop draws random numbers, float64 draws others: the
reference is then the exact float32 program on the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlc.check.examination import weights_of
from mlc.check.policyreport import PolicyCheck
from mlc.check.recorded import Watched
from mlc.check.sandbox import Sandbox
from mlc.compiled.precise import compare_with
from mlc.ir.core import Random
from mlc.trace.capture import Ref

__all__ = ["hypergradient", "policy_check"]


def hypergradient(box: Sandbox, fn: Any, args: Any, kwargs: Any, options: dict[str, Any]
                  ) -> tuple[dict[str, Tensor], bool]:  # fmt: skip
    """The compiled gradient of a call by name of meta-parameter, and whether the loop draws random numbers."""
    box.reset()
    cf = Watched(fn, {**options, "verify": None})
    leaves = pytree.tree_leaves(cf(*args, **kwargs))
    program = cf.program
    assert program is not None
    rec = program.binding
    outs = [leaves[k] for k, x in enumerate(rec.out_leaves) if isinstance(x, Ref) and not x.number]
    pairs = zip(weights_of(outs), outs, strict=True)
    loss = sum((w * torch.nan_to_num(o)).sum() for w, o in pairs if w is not None)
    metas = {program.inputs[i].name: rec.externals[i].tensor for i in program.metas}
    found = torch.autograd.grad(loss, list(metas.values()), allow_unused=True)  # type: ignore[arg-type]
    grads = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(metas.items(), found, strict=True)}
    return grads, any(isinstance(e.op, Random) for e in program.region.walk())


def policy_check(policy: Any, run: Any, exact: dict[str, Tensor], dtype: torch.dtype) -> PolicyCheck:
    """Compare.

    Args:
        policy: As for :func:`mlc.compile`.
        run: Gives what :func:`hypergradient` does, under a policy; None: exact, in float32.
        exact: The gradient that was examined, by name.
        dtype: In which it was.
    """
    mine, draws = run(policy)
    if dtype is torch.float64 and draws:
        (exact, _), dtype = run(None), torch.float32
    names = [n for n in exact if n in mine]
    pairs = [(mine[n].double(), exact[n].double()) for n in names]
    cost = compare_with([b for _, b in pairs], [a for a, _ in pairs], [])
    errors = {n: _relative(a, b) for n, (a, b) in zip(names, pairs, strict=True)}
    whole = _relative(_flat([a for a, _ in pairs]), _flat([b for _, b in pairs]))
    said = policy if isinstance(policy, str) else str(policy)
    return PolicyCheck(said, cost.cosine, cost.norm, whole, str(dtype).removeprefix("torch."), errors)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]) if tensors else torch.zeros(0, dtype=torch.float64)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / max(float(b.norm()), 1e-300)) if a.numel() else 0.0
