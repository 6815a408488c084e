"""Say what a checkpoint is (`pyramid-render inspect PATH`): family, variants, parameters, and the memory it needs."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jobs.settings import EXIT_INTERRUPTED, EXIT_WRONG_JOB, InspectSettings
from pyramid_flow import Checkpoint, SamplingParams
from pyramid_flow.checkpoints.checkpoint import DTYPES, list_variants
from pyramid_flow.checkpoints.weight_files import stored_tensors
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.memory.modes import MODES
from pyramid_flow.memory.usage import PartMemory, needed_bytes, part_folders, part_memory


@dataclass(frozen=True)
class Part:
    """A model of the checkpoint: its parameters, the types they are stored in, and the bytes of its files."""

    parameters: int
    stored: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Variant:
    """A transformer of the checkpoint with the parts that all variants share.

    memory: per part, at the first trained size and the greatest length; needed: bytes on the device by memory mode.
    """

    name: str
    family: str
    sizes: tuple[tuple[int, int], ...]
    max_num_frames: int
    fingerprint: str
    parts: dict[str, Part]
    memory: dict[str, PartMemory]
    needed: dict[str, int]


def run(settings: InspectSettings) -> int:
    """Print what the checkpoint is; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        variants = [describe(Checkpoint.open(settings.model, name), settings) for name in list_variants(settings.model)]
    except PyramidFlowError as error:
        print(f"pyramid-render inspect: {error}", file=sys.stderr)
        return EXIT_WRONG_JOB
    except KeyboardInterrupt:
        print("pyramid-render inspect: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if settings.json_:
        print(json.dumps({"dtype": settings.dtype, "variants": [asdict(variant) for variant in variants]}, indent=2))
    else:
        print(*(line for variant in variants for line in variant_text(variant, settings.dtype)), sep="\n")
    return 0


def describe(checkpoint: Checkpoint, settings: InspectSettings) -> Variant:
    """Read and count everything that is told of one variant; raises CheckpointError."""
    checkpoint.check()
    preset = checkpoint.preset
    params = SamplingParams(*preset.sizes[0], preset.max_num_frames)
    memory = part_memory(checkpoint, DTYPES[settings.dtype], params, has_image=True, tile=settings.tile)
    return Variant(
        name=checkpoint.variant,
        family=checkpoint.family,
        sizes=preset.sizes,
        max_num_frames=preset.max_num_frames,
        fingerprint=checkpoint.fingerprint,
        parts=stored_parts(checkpoint),
        memory=memory,
        needed={mode: needed_bytes(memory, mode) for mode in MODES},
    )


def stored_parts(checkpoint: Checkpoint) -> dict[str, Part]:
    """Return what the files of each part hold, from their headers."""
    parts = {}
    for name, folder in part_folders(checkpoint).items():
        tensors = stored_tensors(folder).values()
        parts[name] = Part(
            parameters=sum(tensor.num_elements for tensor in tensors),
            stored=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
            bytes=sum(file.stat().st_size for file in {tensor.file for tensor in tensors}),
        )
    return parts


def variant_text(variant: Variant, dtype: str) -> list[str]:
    """Return the lines that describe a variant."""
    sizes = ", ".join(f"{height}x{width}" for height, width in variant.sizes)
    height, width = variant.sizes[0]
    rows = [_row(name, part, variant.memory[name]) for name, part in variant.parts.items()]
    header = ("part", "parameters", "stored as", "on disk", "loaded", "at work")
    return [
        f"{variant.name} ({variant.family}), trained for {sizes} and up to {variant.max_num_frames} frames, "
        f"fingerprint {variant.fingerprint}",
        *("  " + _columns(row) for row in (header, *rows)),
        f"  memory in {dtype} for {variant.max_num_frames} frames of {height}x{width}: "
        + ", ".join(f"{mode} {_size(size)}" for mode, size in variant.needed.items()),
    ]


def _row(name: str, part: Part, used: PartMemory) -> tuple[str, ...]:
    sizes = (part.bytes, used.weights, used.activations)
    return name, f"{part.parameters / 1e6:.1f} M", "+".join(part.stored), *map(_size, sizes)


def _columns(cells: Sequence[str]) -> str:
    first, *others = cells
    return first.ljust(16) + "".join(cell.rjust(12) for cell in others)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
