"""What a process of tests keeps in memory: JAX keeps every program that it has compiled."""

import ctypes
import gc
import os
import pathlib
import sys

import jax

MOST_BYTES = 3 << 30  # of one worker; a machine of 16 GiB runs two


def resident_bytes():
    """How much memory this process has; 0 where the system does not say."""
    pages = pathlib.Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


class Programs:
    """Drops the compiled programs where they have become too many, and again after half as much."""

    def __init__(self, most_bytes=MOST_BYTES):
        self.most_bytes = most_bytes

    def drop_if_many(self):
        if resident_bytes() <= self.most_bytes:
            return False
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        self.most_bytes = max(self.most_bytes, resident_bytes() * 3 // 2)
        return True
