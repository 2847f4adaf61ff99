"""Seconds and peak bytes of a call, as the operating system (or the CUDA allocator) sees them. Linux only."""

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Parameters of glibc's mallopt, see malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds of one call; on a GPU wall is the time between two CUDA events around it."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, time.process_time() - cpu
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def return_memory() -> None:
    """Have malloc give freed memory back at once, so that the resident set follows what is alive.

    Call it before anything large is allocated: blocks freed inside an older heap would stay resident. Each
    large block is then mapped and unmapped by the kernel, so measure seconds in another process.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, 64 * 1024)
    libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)


def peak_bytes(call: Callable[[], object]) -> int:
    """Largest memory during one call beyond what was held before it. Needs `return_memory`."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(kibibytes) * 1024


def device_name() -> str:
    """What computed: the GPU, or the model of the CPU."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, os.uname().machine)


def machine() -> dict[str, object]:
    """What a reader must know of the machine to judge the numbers."""
    return {
        "device": DEVICE,
        "device_name": device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
