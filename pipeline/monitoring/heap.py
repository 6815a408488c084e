"""The heap of the C library, which keeps for itself what was freed."""

import ctypes

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_heap() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    By itself it gives back only what lies at a heap's end: a small object that stays keeps all that was freed below it.
    """
    if _malloc_trim:
        _malloc_trim(0)
