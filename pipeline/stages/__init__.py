"""The stages of a render: plain classes whose constructor loads and whose call maps one batch.

This module holds what is known without loading a model; each class has a module of its own.
"""

from typing import Literal

ENCODE, SAMPLE, DECODE, PUBLISH = STAGES = ("encode", "sample", "decode", "publish")
"""Names, in the order of the data."""

FILE, THUMBNAIL = "file", "thumbnail"
"""Tensors of a decoded row: the bytes of its video or still, and of its thumbnail strip."""

Layout = Literal["auto", "staged", "fused"]
"""Which stages share a worker: none but sample and decode (staged), or all (fused)."""
