"""How much memory this process uses, has used and may use, and giving back what it no longer uses."""

import ctypes
import gc
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch


def bytes_text(size: float) -> str:
    """For people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes on the GPU, or the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def resident_bytes() -> int:
    """What this process has in memory now, or at most so far where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory_bytes(torch.device("cpu"))


def available_memory_bytes(device: torch.device) -> int | None:
    """What this process could use in all: what is free, within its control group's limit, and what it has already.

    None where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return resident_bytes() + min(free, _room_in_group(Path("/sys/fs/cgroup"), otherwise=free))


def _room_in_group(group: Path, *, otherwise: int) -> int:
    """Bytes up to the limit of a control group (version 2); `otherwise` where there is no limit."""
    try:
        return int((group / "memory.max").read_text("ascii")) - int((group / "memory.current").read_text("ascii"))
    except (OSError, ValueError):
        return otherwise


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None


def release_all() -> None:
    """Give back what a computation that failed held, and what a GPU keeps for later."""
    gc.collect()
    release_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release_free_memory() -> None:
    """Give freed heap pages back to the system.

    Packs differ in size, so glibc's heap fills with holes that no later tensor fits: without this the resident size
    grows by about the size of a pack's activations every few steps.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
