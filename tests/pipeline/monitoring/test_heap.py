"""Freed memory goes back to the system."""

import ctypes

import psutil
import pytest

from pipeline.monitoring.heap import release_heap

CHUNK_BYTES, CHUNKS = 2**16, 1600


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc_trim is glibc's: nothing can be given back without it"
)
def test_what_was_freed_between_things_that_stay_is_given_back():
    chunks = [bytearray(CHUNK_BYTES) for _ in range(CHUNKS)]
    full = psutil.Process().memory_info().rss
    stay = chunks[::16]
    del chunks
    release_heap()
    assert full - psutil.Process().memory_info().rss > CHUNK_BYTES * (CHUNKS - len(stay)) * 0.8
