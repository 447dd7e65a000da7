"""How much memory this process has used at most, and giving back what it no longer uses."""

import ctypes
import gc
import resource
import sys
from functools import cache
from typing import Any

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes on the GPU, or the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


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
