"""The machine that a run computes on: GPU or CPU, free cores, memory."""

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import Any


def on_gpu() -> bool:
    """Whether the scripts compute on a GPU: there is one, and ACCELERATE_USE_CPU does not say otherwise."""
    import torch
    from accelerate.utils import parse_flag_from_env

    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def warn_of_busy_cores() -> None:
    """Say that other processes need the cores on which this one has threads: threads that wait for a core spin."""
    import psutil
    import torch

    threads, mine = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if threads == 1 or on_gpu():
        return
    busy = [share / 100 for i, share in enumerate(psutil.cpu_percent(0.2, percpu=True)) if mine is None or i in mine]
    idle = len(busy) - sum(busy)
    if idle < threads - 0.5:
        print(
            f"warning: other processes leave {idle:.1f} of {len(busy)} cores to {threads} threads, which slows all of "
            f"them down many times: start with OMP_NUM_THREADS={max(1, int(idle))}",
            flush=True,
        )


def keep_freed_memory() -> None:
    """Let the C library keep what is freed: else each large tensor is mapped, zeroed and faulted in again.

    glibc's M_MMAP_MAX = 0 and M_TRIM_THRESHOLD = 2 GiB (mallopt(3)), unless the environment sets one of them, or a GPU
    computes. `RunFolder.log` gives back what fragments.

    Also limits what oneDNN, and torch's layer above it, keep of every shape that a product in bf16 ever had: rows of
    other lengths make new ones all the time, some MB each.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")  # read at the first product; with 64, bf16 pairs take half as long again
    own = os.environ.keys() & {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    if own or on_gpu():  # beside GPUs, the memory in which models are loaded is wanted back
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where Linux's /proc is not there."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def give_back_fragments(held: int) -> int:
    """Give free memory back once it has grown by a twentieth, since rows of ever new lengths fragment it.

    Args:
        held: what the last call returned; 0 at first.

    Returns:
        Resident bytes to grow from; 0 where memory was given back.
    """
    resident = resident_bytes()
    if not held or resident <= 1.05 * held:
        return held or resident
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return 0


def memory_gb(device: Any) -> float:
    """Peak memory of this process in GB: of the GPU, or resident on CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
