"""Options of a plan: what they may be, and sizes written as people write them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlc.errors import PlanError
from mlc.passes.lowering.modes import check_flows
from mlc.passes.lowering.pipeline import check_passes
from mlc.passes.precision.policy import check_precision
from mlc.units import parse_memory

__all__ = ["check_levers", "check_options", "free_memory", "planning", "sweeping"]


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that make no sense.

    Raises:
        PlanError: naming the option.
    """
    if options.get("stop_gradient", "all") not in ("all", "inner", "torch"):
        raise PlanError(f"stop_gradient={options['stop_gradient']!r}", advice='use "all", "inner" or "torch"')
    if options.get("backend", "auto") not in ("auto", "interpreter", "inductor"):
        raise PlanError(f"backend={options['backend']!r}", advice='use "auto", "interpreter" or "inductor"')
    check_flows(options.get("flows"))
    check_levers(options.get("levers"))
    check_passes(options.get("passes"))
    check_precision(options.get("precision"))
    mesh = options.get("mesh")
    if mesh is not None and not (hasattr(mesh, "get_group") and hasattr(mesh, "ndim")):
        raise PlanError(f"mesh={mesh!r}", advice="give a torch.distributed.device_mesh.DeviceMesh")
    parse_memory(options.get("memory"))


# What each lever may be: the least number, and whether None (all, never) is one.
_LEVERS = {"price": (0, False), "slots": (1, True), "parts": (1, False), "offload": (0, True)}


def check_levers(levers: Any) -> None:
    """Refuse what is no dict of levers.

    Raises:
        PlanError: naming what is wrong.
    """
    if levers is None:
        return
    if not isinstance(levers, Mapping):
        raise PlanError(f"levers={levers!r}", advice='write levers={"slots": 2}, for example')
    for name, value in levers.items():
        if name not in _LEVERS:
            raise PlanError(f"levers: {name!r} is not a lever", advice=f"use {', '.join(_LEVERS)}")
        least, none = _LEVERS[name]
        number = isinstance(value, (int, float)) if name == "price" else isinstance(value, int)
        if not (value is None and none) and (not number or isinstance(value, bool) or value < least):
            raise PlanError(f"levers[{name!r}]={value!r}", advice=f"at least {least}{', or None' * none}")


def planning(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a compiled function that its plan depends on."""
    return {k: v for k, v in options.items() if k not in ("verify", "nonfinite")}


def sweeping(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a compiled function that its curve of time and memory depends on."""
    return {k: v for k, v in planning(options).items() if k not in ("memory", "levers", "mesh")}


def free_memory(device: torch.device) -> int:
    """Bytes that the device has free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
