"""What a call left: everything reachable from arguments and result, flat, by where it stands; and comparing two.

Learned tensors' own `.grad` is left out: an inner `backward` does not add to it under mlc, on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Flat = dict[str, Any]


def snapshot(args: Mapping[str, Any], out: Any, metas: Mapping[str, Tensor]) -> Flat:
    """Copies of all that can be reached, and the state of the global generator."""
    skip = {id(t) for t in metas.values()}
    seen: dict[int, Any] = {}  # what has been met, by identity, kept alive so that none is reused
    found: Flat = {}
    for name, thing in (*args.items(), ("result", out)):
        found.update(walk(thing, name, skip, seen))
    found["generator"] = torch.get_rng_state()
    return found


def walk(x: Any, at: str, skip: set[int], seen: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    """(where, copy) of every tensor and plain value."""
    if isinstance(x, bool | int | float | str | type(None)):
        yield at, x
        return
    if id(x) in seen:
        return
    seen[id(x)] = x
    if isinstance(x, Tensor):
        yield at, x.detach().clone()
        yield f"{at}.requires_grad", x.requires_grad
        if x.is_leaf and x.requires_grad and id(x) not in skip:
            yield f"{at}.grad", None if x.grad is None else x.grad.detach().clone()
        return
    for name, part in parts(x):
        yield from walk(part, f"{at}.{name}", skip, seen)


def parts(x: Any) -> Iterator[tuple[str, Any]]:
    """Named parts of a container or object."""
    if isinstance(x, nn.Module):
        yield "training", x.training
        yield from x.named_parameters(recurse=False)
        yield from x.named_buffers(recurse=False)
        yield from x.named_children()
        yield "hooks", len(x._forward_hooks) + len(x._forward_pre_hooks)
    elif isinstance(x, Optimizer):
        for g, group in enumerate(x.param_groups):
            yield from ((f"group{g}.{k}", v) for k, v in group.items())
            for n, p in enumerate(group["params"]):
                yield f"state{g}.{n}", dict(x.state.get(p, {}))
    elif isinstance(x, LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau):
        yield from ((k, v) for k, v in x.state_dict().items() if k != "_schedulers")
    elif isinstance(x, torch.Generator):
        yield "state", x.get_state()
    elif isinstance(x, torch.utils.data.DataLoader):
        yield "generator", x.generator
    elif isinstance(x, Mapping):
        yield from ((repr(k), v) for k, v in x.items())
    elif isinstance(x, list | tuple):
        yield "length", len(x)
        yield from ((str(k), v) for k, v in enumerate(x))
    elif is_dataclass(x):
        yield from ((f.name, getattr(x, f.name)) for f in fields(x))
    elif hasattr(x, "tolist"):
        yield "listed", x.tolist()


def gap(got: Any, wanted: Any) -> float | str:
    """How far two copies are apart: a relative number, or words."""
    if type(got) is not type(wanted) and not (isinstance(got, Tensor) and isinstance(wanted, Tensor)):
        return f"{type(got).__name__} instead of {type(wanted).__name__}"
    if isinstance(wanted, Tensor):
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"{got.dtype} {tuple(got.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}"
        if not wanted.is_floating_point():
            return 0.0 if torch.equal(got, wanted) else "other values"
        if not torch.equal(got.isnan(), wanted.isnan()):
            return "NaN"
        distance = float((got - wanted).abs().nan_to_num().max()) if wanted.numel() else 0.0
        return distance / max(1.0, float(wanted.abs().max())) if distance else 0.0
    if isinstance(wanted, float):
        same = got == wanted or (math.isnan(got) and math.isnan(wanted))
        return 0.0 if same else abs(got - wanted) / max(1.0, abs(wanted))
    return 0.0 if got == wanted else f"{got!r} instead of {wanted!r}"


def differences(got: Flat, wanted: Flat, allowed: float = 1e-9, loose: Mapping[str, float] | None = None) -> list[str]:
    """What is not the same, in words; `loose`: what is allowed for single numbers."""
    found = [f"{name} is there" for name in got.keys() - wanted.keys()]
    found += [f"{name} is missing" for name in wanted.keys() - got.keys()]
    for name in wanted.keys() & got.keys():
        if name.startswith("result") and name.endswith(".requires_grad") and got[name]:
            continue  # a value of state (an average, a frozen teacher): mlc differentiates it, PyTorch does not
        apart = gap(got[name], wanted[name])
        if isinstance(apart, str):
            found.append(f"{name}: {apart}")
        elif not apart <= max(allowed, (loose or {}).get(name, 0.0)):
            found.append(f"{name}: off by {apart:.1e}")
    return sorted(found)


def gist(found: list[str]) -> str:
    """What sort of differences these are, the same for programs with the same fault: the most telling one."""
    roots = {f.split(".")[0].split(":")[0].split(" ")[0] for f in found}
    where = "generator" if "generator" in roots else "result" if roots == {"result"} else "state"
    ways = {
        way for f in found for way in (" is there", " is missing", " instead of ", "NaN", "off by", "other") if way in f
    }
    order = (" is missing", " is there", " instead of ", "NaN", "other", "off by")
    return f"{where} {next((way for way in order if way in ways), '').strip()}"
