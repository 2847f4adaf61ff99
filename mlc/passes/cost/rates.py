"""Rates of a device: how fast it multiplies matrices, moves bytes, draws special functions and starts an operator.

Measured once per device, torch version and thread count (about two seconds, said on stderr) and kept in the user's
cache folder, so that the same plan comes out again; ``MLC_RATES`` names another file.  The model they feed is a
roofline (Williams et al. 2009): an operator takes its start plus the larger of its arithmetic and its traffic.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["Rates", "rates", "shared_rates"]


class Rates(BaseModel):
    """What a device does in a second.

    Attributes:
        flops: Matrix multiplication, floating point operations per second, by item size in bytes (2, 4, 8).
        near: Traffic of operators whose operands fit the cache, bytes per second.
        far: Traffic of operators whose operands do not, bytes per second.
        cache: Bytes of operands from which traffic is far.
        special: Elements per second of exponentials and the like, by item size.
        start: Seconds to start one operator from Python.
        strain: Time of a real sequence of operators, whose results are new memory and whose operands come from
            elsewhere, over the roofline's.
        threads: Threads that were used.
        host: Copies between the device and pinned memory of the host beside the computation, bytes per second (the
            slower direction); None where they are the same memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flops: dict[int, float]
    near: float = Field(gt=0)
    far: float = Field(gt=0)
    cache: int = Field(gt=0)
    special: dict[int, float]
    start: float = Field(gt=0)
    strain: float = Field(ge=1)
    threads: int = Field(ge=1)
    host: float | None = Field(default=None, gt=0)

    @property
    def unit(self) -> float:
        """Seconds of moving a byte once, in a real sequence of operators."""
        return self.strain / self.far


def rates(device: torch.device) -> Rates:
    """Rates of the device, from the cache folder or measured now."""
    return _SHARED.get() or _rates(device.type, device.index or 0, torch.get_num_threads())


@contextlib.contextmanager
def shared_rates(told: Rates) -> Iterator[None]:
    """Rates that several processes agreed on, so that they decide alike."""
    token = _SHARED.set(told)
    try:
        yield
    finally:
        _SHARED.reset(token)


_SHARED: contextvars.ContextVar[Rates | None] = contextvars.ContextVar("rates", default=None)


@functools.cache
def _rates(kind: str, index: int, threads: int) -> Rates:
    if kind not in ("cpu", "cuda"):
        kind = "cpu"
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, index)
    given = os.environ.get("MLC_RATES")
    file = Path(given) if given else _folder() / f"rates-{_title(device, threads)}.json"
    try:
        found = Rates.model_validate_json(file.read_text())
        if given or kind == "cpu" or found.host is not None:
            return found
    except (OSError, ValidationError):
        pass
    print("mlc: measuring how fast this device is (once, about two seconds)", file=sys.stderr)
    measured = _measure(device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(measured.model_dump_json(indent=2))
    except OSError:
        pass  # a read-only home: measured again next time
    return measured


def _title(device: torch.device, threads: int) -> str:
    name = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"{name}-{threads}-{torch.__version__}".replace(" ", "-").replace("/", "-")


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlc"


def _measure(device: torch.device) -> Rates:
    with torch.no_grad():
        ideal = Rates(
            flops={size: _matmul(device, dtype) for size, dtype in _DTYPES.items()},
            near=_traffic(device, 2**15, 1), far=_traffic(device, 2**17, 64), cache=2**19,
            special={size: _special(device, dtype) for size, dtype in _DTYPES.items()},
            start=_start(device), strain=1.0,
            threads=torch.get_num_threads(), host=_link(device),
        )  # fmt: skip
        return ideal.model_copy(update={"strain": max(1.0, _strain(device, ideal))})


_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def _traffic(device: torch.device, n: int, many: int) -> float:
    """Bytes per second of additions: one pair of vectors stays in the cache, many pairs do not fit."""
    pairs = [(torch.ones(n, device=device), torch.ones(n, device=device)) for _ in range(many)]
    return 12 * n / _seconds(device, [functools.partial(torch.ops.aten.add.Tensor, a, b) for a, b in pairs])


def _link(device: torch.device) -> float | None:
    """Bytes per second of copies from and to pinned memory, the slower of both; None on the CPU."""
    if device.type != "cuda":
        return None
    n = 2**25
    here = torch.empty(n, dtype=torch.uint8, device=device)
    there = torch.empty(n, dtype=torch.uint8, pin_memory=True)
    ways = ((there, here), (here, there))
    return n / max(_seconds(device, [functools.partial(a.copy_, b, non_blocking=True)]) for a, b in ways)


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    n, many = (384, 16) if device.type == "cpu" else (4096, 1)
    made = [[torch.ones(n, n, device=device, dtype=dtype) for _ in range(2)] for _ in range(many)]
    return 2 * n**3 / _seconds(device, [functools.partial(torch.ops.aten.mm.default, a, b) for a, b in made])


def _start(device: torch.device) -> float:
    a, b = torch.ones(16, device=device), torch.ones(16, device=device)
    return _seconds(device, [functools.partial(torch.ops.aten.add.Tensor, a, b)])


def _strain(device: torch.device, r: Rates) -> float:
    """A stack of residual layers, (1024, 128) with 512 inside, everything held, over its roofline."""
    n, d, k, layers = 1024, 128, 512, 12
    own = torch.Generator(device).manual_seed(0)  # the user's generator stays where it is
    x, up, down = (torch.randn(*s, device=device, generator=own) for s in ((n, d), (d, k), (k, d)))
    a: Any = torch.ops.aten

    def call() -> object:
        held = [x]
        for _ in range(layers):
            inner = a.mm.default(held[-1], up)
            bent = a.tanh.default(inner)
            out = a.mm.default(bent, down)
            scaled = a.mul.Tensor(out, held[-1])
            held += [inner, bent, out, scaled, a.add.Tensor(scaled, held[-1])]
        return held

    products, wide, narrow = 2 * 2.0 * n * d * k / r.flops[4], 4.0 * n * k, 4.0 * n * d
    ideal = layers * (5 * r.start + products + max(2 * wide / r.far, n * k / r.special[4]) + 6 * narrow / r.far)
    return _seconds(device, [call]) / ideal


def _special(device: torch.device, dtype: torch.dtype) -> float:
    n = 2**16
    a = torch.ones(n, device=device, dtype=dtype)
    return n / _seconds(device, [lambda: torch.ops.aten.tanh.default(a)])


def _seconds(device: torch.device, calls: list[Callable[[], object]]) -> float:
    """Least seconds of a call among several; of short ones, and on a GPU, in a queue of calls.

    Takes about ``_PATIENCE`` seconds, however slow the device is.
    """
    found: list[float] = []
    rounds, end = 1, time.perf_counter() + _PATIENCE
    while len(found) < 10 and (len(found) < 2 or time.perf_counter() < end):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
        found.append(took / (rounds * len(calls)))
        rounds = max(1, min(20 // len(calls), int(_PATIENCE / 8 / max(found[-1] * len(calls), 1e-9))))
    return min(found)  # what the device can do; others on the machine only add to it


_PATIENCE = 0.12
