"""What fits into a device's memory: the memory mode of a checkpoint's parts, and the tiles in which the VAE decodes."""

import logging
from collections.abc import Callable, Collection, Mapping

import torch

from pyramid_flow.checkpoints.checkpoint import Checkpoint
from pyramid_flow.errors import InvalidValueError
from pyramid_flow.memory.modes import MODES, Memory, MemoryMode
from pyramid_flow.memory.placement import Placement, check_device, free_bytes
from pyramid_flow.memory.usage import PartMemory, needed_bytes, part_memory
from pyramid_flow.sampling.params import SamplingParams

logger = logging.getLogger(__name__)

USABLE = 0.9
"""Of free memory; the rest is for workspaces and fragments."""

SMALLER_TILES = (512, 256)


def fitting_mode(parts: Mapping[str, PartMemory], available: float) -> MemoryMode:
    """Return the first mode in which the parts fit into the bytes that are available, or else the one that needs least.

    The modes get slower in the order in which they need less.
    """
    fitting = (mode for mode in MODES if needed_bytes(parts, mode) <= USABLE * available)
    return next(fitting, MODES[-1])


def fitting_tile(activations: Callable[[int | None], int], available: float) -> int | None:
    """Return no tile, or the largest with whose activations decoding fits into the bytes that are available."""
    fitting = (tile for tile in (None, *SMALLER_TILES) if activations(tile) <= USABLE * available)
    return next(fitting, SMALLER_TILES[-1])


def choose_placement(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    memory: Memory,
    *,
    parts: Collection[str] | None = None,
    tile: int | None = None,
    available: Callable[[torch.device], int] = free_bytes,
) -> Placement:
    """Return the placement of some or all parts of a checkpoint, before they are loaded; says what auto has chosen.

    auto: `full` on a CPU, else what fits into the memory that is available while one video of the preset's first size
    and greatest length is rendered, and decoded in tiles of so many pixels. Raises InvalidValueError for an unknown
    mode, and CheckpointError.
    """
    device = check_device(device)
    if memory != "auto":
        if memory not in MODES:
            raise InvalidValueError("memory", memory, f"is not one of auto, {', '.join(MODES)}")
        return Placement(device, memory)
    if device.type == "cpu":
        logger.info("memory mode full: on a CPU there is nothing to move")
        return Placement(device)
    params = SamplingParams(*checkpoint.preset.sizes[0], checkpoint.preset.max_num_frames)
    needs = part_memory(checkpoint, dtype, params, has_image=True, tile=tile, parts=parts)
    free = available(device)
    mode = fitting_mode(needs, free)
    needed = ", ".join(f"{each} {needed_bytes(needs, each) / 2**30:.1f}" for each in MODES)
    fits = needed_bytes(needs, mode) <= USABLE * free
    told = "memory mode %s for %s: needed are %s GiB, available on %s %.1f"
    told += "" if fits else "; it does not fit: decode in tiles, or render smaller videos"
    logger.log(logging.INFO if fits else logging.WARNING, told, mode, "+".join(needs), needed, device, free / 2**30)
    return Placement(device, mode)
