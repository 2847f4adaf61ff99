"""What a large inner model would cost on many devices, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from mlc.errors import PlanError
from mlc.passes.formulas.scaling import FORMULAS, Cluster, Inner, Scaled, changes, gathers, scaled

__all__ = ["Inner", "cluster_of", "inner_of", "scaling_text"]

_PLACES = {
    "device": "inner gradients on the device", "host": "inner gradients on the host",
    "disk": "inner gradients on disk", "nowhere": "sparse states, steps run again",
}  # fmt: skip


def scaling_text(inner: Inner, cluster: Cluster, devices: Sequence[int], steps: Sequence[int]) -> str:
    """A table of time and memory per device, and where the plan changes.

    Args:
        inner: The inner model.
        cluster: Rates.
        devices: Numbers of devices.
        steps: Numbers of inner steps.
    """
    lines = [
        f"{inner.parameters:.3g} parameters, {inner.layers} layers of {inner.width} channels, {inner.tokens} tokens a "
        "device and inner step",
        f"{cluster.flops * cluster.used / 1e12:.0f} TFLOP/s, {cluster.memory / 1e9:.0f} GB a device; "
        f"{cluster.link / 1e9:.0f} GB/s in a node of {cluster.node}, {cluster.network / 1e9:.0f} GB/s between nodes, "
        f"{cluster.host_link / 1e9:.0f} to the host, {cluster.disk_link / 1e9:.3g} to disk",
        "",
        "  GPUs     T   an outer step   bound by       memory   of it saved   plan",
    ]
    for g in devices:
        for t in steps:
            lines.append(_row(g, t, scaled(inner, cluster, g, t)))
    lines += ["", *(_links(inner, cluster, g) for g in devices)]
    for g in devices:
        lines += ["", f"where the plan changes on {g} GPUs:"]
        for t, x in changes(inner, cluster, g, max(steps)):
            lines.append(f"  from T={t:<5} {_plan(x)}")
    lines += ["", "bytes on a device, flop and bytes of an inner step:"]
    lines += [f"  {name}: {expression}" for name, expression in FORMULAS.items()]
    return "\n".join(lines) + "\n"


def _row(devices: int, steps: int, x: Scaled | None) -> str:
    if x is None:
        return f"{devices:6d} {steps:5d}   nothing fits"
    saved = x.memory["saved"] + x.aside
    costs = f"{x.total:13.4g} s   {x.bound:12s} {x.peak / 1e9:6.1f} GB {saved / 1e9:10.1f} GB"
    return f"{devices:6d} {steps:5d} {costs}   {_plan(x)}"


def _links(inner: Inner, cluster: Cluster, devices: int) -> str:
    """Which collective is the slowest, and when it is the bound."""
    found = gathers(inner, cluster, devices)
    slow = "between nodes" if found["between nodes"] > found["in a node"] else "in a node"
    return (
        f"{devices} GPUs: a gather of all parameters takes {1e3 * found['in a node']:.1f} ms in a node, "
        f"{1e3 * found['between nodes']:.1f} ms between nodes; that {slow} bounds a step below {found['tokens']:.0f} "
        "tokens a device"
    )


def _plan(x: Scaled | None) -> str:
    return "nothing fits" if x is None else f"{x.way}; {_PLACES[x.place]}"


def inner_of(parameters: float, layers: int, width: int, tokens: int) -> Inner:
    """An inner model.

    Raises:
        PlanError: for numbers that are not above 0.
    """
    if min(parameters, layers, width, tokens) <= 0:
        raise PlanError("an inner model of nothing", advice="numbers above 0")
    return Inner(parameters, layers, width, tokens)


def cluster_of(rates: Sequence[str]) -> Cluster:
    """The default cluster with other rates, each written as ``name=number``.

    Raises:
        PlanError: for what is no rate of a cluster.
    """
    known = {f.name: f.type for f in fields(Cluster)}
    found: dict[str, float] = {}
    for text in rates:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise PlanError(f"the rate {text!r} is no number", advice="memory=80e9, for example") from None
        if name not in known or not 0 < found[name] < float("inf"):
            raise PlanError(f"{text!r} is no rate of a cluster", advice=f"above 0, one of: {', '.join(known)}")
    given: dict[str, Any] = {k: int(v) if k == "node" else v for k, v in found.items()}
    return Cluster(**given)
