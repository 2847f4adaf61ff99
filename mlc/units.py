"""Sizes and times as people write and read them."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError

from mlc.errors import PlanError

__all__ = ["parse_memory", "size_text", "time_text"]

_SIZE = TypeAdapter(ByteSize)


def parse_memory(memory: int | str | None) -> int | str | None:
    """Bytes of a budget; ``"min"`` and None are passed on.

    Args:
        memory: Bytes, or a size with a unit as pydantic's ``ByteSize`` reads it (``"800MiB"``, ``"2 GB"``, ``"2GiB"``).

    Raises:
        PlanError: when it is not a size.
    """
    if memory is None or memory == "min":
        return memory
    try:
        size = None if isinstance(memory, bool) else int(_SIZE.validate_python(memory))
    except ValidationError:
        size = None
    if size is None or size <= 0:
        raise PlanError(f"memory={memory!r} is not a size", advice='write bytes, "800MiB", "2GiB" or "min"')
    return size


def size_text(n: float) -> str:
    """Bytes in readable units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def time_text(seconds: float) -> str:
    """Seconds in readable units."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
