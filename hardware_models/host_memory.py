"""Keeps freed pages in the process, so that CPU steps after warm-up pay no page faults."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""glibc's parameter numbers of mallopt (malloc.h)."""
_NEVER_TRIM = -1
"""Disables trimming (mallopt(3)); the largest positive value would still give back what exceeds 2 GiB."""
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_pages() -> bool:
    """Whether the C allocator now keeps what is freed; False where it is not glibc's (nothing is changed then).

    **Model**: large blocks come from the heap instead of mmap and the heap is never trimmed, so a freed tensor's pages are
    reused warm, as CUDA's caching allocator does. Without it every large tensor costs a page fault per 4 KiB, each time.

    **Not modelled**: fragmentation of the heap; call it before the first large allocation.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER_TRIM), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings)
