"""Scaling on paper: time and memory per device of an outer step over a large inner model, in closed form.

The inner model is a decoder-only transformer, trained with parameters, optimizer and saved inner gradients sharded
over all devices (as FSDP and ZeRO-3 do: Rajbhandari et al. 2020).  Work is counted in F, one forward pass of the inner
loss: an inner step takes 3 F, and what a step costs in all, with its share of the hypergradient, is 8.1 F where its
residuals are kept, 11.1 F where the step is done again for the product, and 14 F where that is done layer by layer
(measured on ATen graphs of a transformer).  Activations are those of Korthikanti et al. 2022, 34 bytes per token,
channel and layer.  Collectives are rings within a node and across nodes.  Compute, collectives and copies overlap: the
slowest counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy as sp

__all__ = ["FORMULAS", "Cluster", "Inner", "Scaled", "changes", "gathers", "scaled"]

n, N, T, b, d, L, G = sp.symbols("n N T b d L G", positive=True)

_STATE = 4 + 8 + 12 + 2 + 2  # bytes per parameter: master, Adam's two, adjoints of these three, bf16 copy and gradient
_SAVED = 2  # bytes per parameter and inner step: the inner gradient, bf16
_WHOLE = 34  # bytes of activations per token, channel and layer
_WORK = {"residuals kept": 8.1, "done again": 11.1, "done again layer by layer": 14.0}
_GATHERS = {"residuals kept": 5, "done again": 7, "done again layer by layer": 9}  # of 2 n bytes, and scatters

# Bytes on a device and seconds per inner step, as expressions in: parameters n, devices N, inner steps T, tokens of a
# device b, channels d, layers L, devices of a node G.
FORMULAS: dict[str, sp.Expr] = {
    "state": _STATE * n / N,
    "saved per step": _SAVED * n / N,
    "gathered layers": 3 * 2 * 2 * n / L,  # two layers at a time, with their tangents and gradients
    "activations": _WHOLE * b * d * L,
    "activations at borders": 2 * 2 * b * d * L + 2 * _WHOLE * b * d,
    "forward pass, flop": 2 * n * b,
    "gather, bytes in a node": 2 * n * (G - 1) / G,
    "gather, bytes between nodes": 2 * n / G * (N / G - 1) / (N / G),
}


@dataclass(frozen=True)
class Inner:
    """The inner model and its batch.

    Attributes:
        parameters: Their number.
        layers: Blocks.
        width: Channels.
        tokens: Of a batch on each device.
    """

    parameters: float = 7e9
    layers: int = 32
    width: int = 4096
    tokens: int = 8192


@dataclass(frozen=True)
class Cluster:
    """Rates of a cluster; bytes, flop and seconds, per device and direction.

    Attributes:
        flops: Dense bfloat16 products (NVIDIA H200 data sheet: 989 TFLOP/s).
        used: Share of it that training reaches (assumed).
        memory: Of a device (the same: 141 GB).
        usable: Share of it that a plan may count on.
        node: Devices of a node.
        link: Within a node (the same: NVLink, 900 GB/s both ways).
        network: Between nodes (one 400 Gb/s port per device, as in DGX H100).
        latency: Of a hop of a ring.
        host_link: To the host (PCIe 5.0 x16, 64 GB/s, of which 50 are reached).
        host: Memory of the host per device (DGX H200: 2 TB for eight).
        disk: Per device (the same: 30 TB of NVMe for eight).
        disk_link: To it, per device (assumed: 25 GB/s for eight).
    """

    flops: float = 989e12
    used: float = 0.4
    memory: float = 141e9
    usable: float = 0.9
    node: int = 8
    link: float = 450e9
    network: float = 50e9
    latency: float = 10e-6
    host_link: float = 50e9
    host: float = 250e9
    disk: float = 3.75e12
    disk_link: float = 3.1e9


@dataclass(frozen=True)
class Scaled:
    """What one plan would cost on a number of devices.

    Attributes:
        devices: Their number.
        steps: Inner steps.
        way: How the product gets its values.
        place: Where inner gradients (and residuals) are saved: ``"device"``, ``"host"``, ``"disk"`` or ``"nowhere"``.
        seconds: Of an outer step, by what takes it: ``"compute"``, ``"collectives"``, ``"copies"``.
        memory: Bytes on each device, by what they hold.
        aside: Bytes on the host or disk, per device.
        fits: Whether all of it fits.
    """

    devices: int
    steps: int
    way: str
    place: str
    seconds: dict[str, float]
    memory: dict[str, float]
    aside: float
    fits: bool

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def total(self) -> float:
        """Seconds of an outer step."""
        return max(self.seconds.values())

    @property
    def peak(self) -> float:
        """Bytes on each device."""
        return sum(self.memory.values())


def values(inner: Inner, cluster: Cluster, devices: int, steps: int) -> dict[str, float]:
    """The formulas in numbers."""
    node = min(cluster.node, devices)
    at = {n: inner.parameters, N: devices, T: steps, b: inner.tokens, d: inner.width, L: inner.layers, G: node}
    return {k: float(e.subs(at)) for k, e in FORMULAS.items()}


def candidates(inner: Inner, cluster: Cluster, devices: int, steps: int) -> Iterator[Scaled]:
    """Every way and place."""
    v = values(inner, cluster, devices, steps)
    rate = cluster.flops * cluster.used
    forward = v["forward pass, flop"] / rate
    gather = _gather(v, cluster, devices)
    for way, work in _WORK.items():
        kept = v["saved per step"] + (v["activations"] if way == "residuals kept" else 0.0)
        working = v["activations at borders"] if way == "done again layer by layer" else 2 * v["activations"]
        base = {"state": v["state"], "layers gathered": v["gathered layers"], "activations": working}
        for place in ("device", "host", "disk", "nowhere"):
            again = _replays(steps) if place == "nowhere" else 0.0
            if place == "nowhere" and way == "residuals kept":
                continue
            held = {"device": steps * kept, "nowhere": 2 * steps**0.5 * 12 * inner.parameters / devices}.get(
                place, 2 * kept
            )
            seconds = {
                "compute": steps * (work + 3 * again) * forward,
                "collectives": steps * (_GATHERS[way] + 3 * again) * gather,
                "copies": _copies(steps * kept, place, cluster),
            }
            aside = steps * kept if place in ("host", "disk") else 0.0
            memory = {**base, "saved": held}
            room = {"host": cluster.host, "disk": cluster.disk}.get(place, float("inf"))
            fits = sum(memory.values()) <= cluster.usable * cluster.memory and aside <= room
            yield Scaled(devices, steps, way, place, seconds, memory, aside, fits)


def scaled(inner: Inner, cluster: Cluster, devices: int, steps: int) -> Scaled | None:
    """The fastest plan that fits; None where none does.  Of equally fast ones, that which stays on the device."""
    fitting = [x for x in candidates(inner, cluster, devices, steps) if x.fits]
    return min(fitting, key=lambda x: (x.total, x.aside), default=None)


def gathers(inner: Inner, cluster: Cluster, devices: int) -> dict[str, float]:
    """Seconds of a gather of all parameters, in a node and between nodes, and below which tokens they are the bound.

    ``"tokens"``: of a batch on a device at which the collectives of a step that is done again take as long as its
    computation.
    """
    v = values(inner, cluster, devices, 1)
    within, between = _parts(v, cluster, devices)
    way = "done again"
    work = _WORK[way] * FORMULAS["forward pass, flop"] / (cluster.flops * cluster.used)
    found = sp.solve(sp.Eq(work.subs(n, inner.parameters), _GATHERS[way] * _gather(v, cluster, devices)), b)
    return {"in a node": within, "between nodes": between, "tokens": float(found[0])}


def changes(inner: Inner, cluster: Cluster, devices: int, most: int) -> list[tuple[int, Scaled | None]]:
    """Numbers of inner steps, up to ``most``, from which on another plan is the fastest that fits."""
    found: list[tuple[int, Scaled | None]] = []
    known: dict[int, Scaled | None] = {}

    def at(t: int) -> Scaled | None:
        if t not in known:
            known[t] = scaled(inner, cluster, devices, t)
        return known[t]

    t = 1
    while t <= most:
        now = at(t)
        found.append((t, now))
        low, high = t, most + 1
        while high - low > 1:  # a plan that has been left does not come back: it only grows
            middle = (low + high) // 2
            low, high = (middle, high) if _same(at(middle), now) else (low, middle)
        t = high
    return found


def _same(x: Scaled | None, y: Scaled | None) -> bool:
    return (x is None) == (y is None) and (x is None or y is None or (x.way, x.place) == (y.way, y.place))


def _gather(v: dict[str, float], c: Cluster, devices: int) -> float:
    """Seconds of one gather of all parameters (a scatter of sums takes as long)."""
    return max(_parts(v, c, devices))


def _parts(v: dict[str, float], c: Cluster, devices: int) -> tuple[float, float]:
    """Seconds within a node and between nodes (both go on at once, layer by layer)."""
    nodes = max(1, devices // c.node)
    within = v["gather, bytes in a node"] / c.link + (min(c.node, devices) - 1) * c.latency
    between = v["gather, bytes between nodes"] / c.network + (nodes - 1) * c.latency if nodes > 1 else 0.0
    return within, between


def _replays(steps: int) -> float:
    """Further inner steps per inner step where states of every sqrt(T)-th step are kept (Griewank 1992: two sweeps)."""
    return 1.0 if steps > 1 else 0.0


def _copies(nbytes: float, place: str, c: Cluster) -> float:
    """Seconds of writing and reading what rests aside."""
    rate = {"host": c.host_link, "disk": c.disk_link}.get(place)
    return 0.0 if rate is None else 2 * nbytes / rate
