"""What the C library does with memory that a tensor gave back."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_SHARED = 2**30  # bytes; only larger tensors have pages of their own


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, which wants the same sizes again.

    It gives large blocks back to the system at once, and fetching fresh pages then takes a tenth of
    a small model's step on a CPU (LOG.md). A process holds on to the most that it ever used. Other
    C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _SHARED)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
