"""Tune glibc's malloc for training on a CPU."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_SHARED = 2**30  # bytes; only larger tensors have pages of their own


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, because the next step allocates the same sizes again.

    By default glibc returns large blocks to the system at once, and getting fresh pages takes a
    tenth of a small model's step on a CPU (LOG.md). With this setting the process keeps its peak
    memory. Other C libraries are not changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _SHARED)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
