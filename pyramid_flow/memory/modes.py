"""The memory modes: how many of a checkpoint's weights are on the device at a time."""

from typing import Literal, get_args

MemoryMode = Literal["full", "offload", "sequential"]
MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
"""full: all parts stay on the device; offload: one part, while it computes; sequential: one layer."""

Memory = Literal["auto", MemoryMode]
"""A mode, or auto: the first one that fits into the free memory."""
