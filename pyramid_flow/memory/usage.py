"""How much device memory a checkpoint takes, by part and by memory mode.

Weights come from the headers of their files. Activations are the peak of live tensors while a part computes: counted on
its own modules without weights, for text encoders estimated from their configs. Any size takes a second or two.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyramid_flow.checkpoints.checkpoint import Checkpoint
from pyramid_flow.checkpoints.weight_files import StoredTensor, stored_tensors
from pyramid_flow.memory.encoders import encoder_peak
from pyramid_flow.memory.modes import MemoryMode
from pyramid_flow.pixels import quantized
from pyramid_flow.sampling.params import SamplingParams
from pyramid_flow.sampling.pyramid import latent_pyramid
from pyramid_flow.sampling.sampler import plan_cache
from pyramid_flow.sampling.schedule import PyramidSchedule
from pyramid_flow.sampling.velocity import VelocityField
from pyramid_flow.text.embedding import MAX_TOKENS, TextEmbedding
from pyramid_flow.vae.model import temporal_chunks

META, HOST = torch.device("meta"), torch.device("cpu")

TRANSFORMER, VAE = "transformer", "vae"

BLOCK = re.compile(r"(.*?\.\d+)\.")
"""Of a tensor's name what names its block: the outermost numbered module."""


@dataclass(frozen=True)
class PartMemory:
    """Bytes that one part takes on the device.

    weights: all of them. block: the largest block and what lies outside of all blocks, which is more than is there when
    the part runs layer by layer. activations: the peak beyond the weights while it works.
    """

    weights: int
    block: int
    activations: int


def part_folders(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the folders of "transformer", "vae" and each text encoder, which is called by its folder."""
    transformer, vae, *encoders = checkpoint.folders
    return {folder.name: folder for folder in encoders} | {TRANSFORMER: transformer, VAE: vae}


def part_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of each part's weights once loaded; reads file headers. Raises CheckpointError."""
    return {part: sum(_block_bytes(folder, dtype).values()) for part, folder in part_folders(checkpoint).items()}


def part_memory(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    params: SamplingParams,
    *,
    batch_size: int = 1,
    has_image: bool = False,
    window: int = 1,
    tile: int | None = None,
    parts: Collection[str] | None = None,
) -> dict[str, PartMemory]:
    """Return what each part takes while videos of one shape are rendered; the names are those of `part_folders`.

    batch_size: videos that are sampled together (they are encoded and decoded one by one); has_image: image-to-video;
    window, tile: as in `CausalVideoVAE.decode`; parts: of these only, None = of all. Activations are those of the
    sampler's widest evaluation, of two prompts of full length, and of decoding the first chunks. Not counted are the
    history cache, which takes of what is left (see `plan_cache`), and what a device's libraries keep for themselves,
    such as workspaces, fragments and compiled kernels: leave some room. Reads no weights. Raises CheckpointError.
    """
    peaks = {
        TRANSFORMER: partial(_sampling_peak, checkpoint, dtype, params, batch_size),
        VAE: partial(_vae_peak, checkpoint, dtype, params, has_image, window, tile),
    }
    taken = {}
    for part, folder in part_folders(checkpoint).items():
        if parts is not None and part not in parts:
            continue
        blocks = _block_bytes(folder, dtype)
        outside = blocks.pop("", 0)
        taken[part] = PartMemory(
            weights=outside + sum(blocks.values()),
            block=outside + max(blocks.values(), default=0),
            activations=peaks[part]() if part in peaks else encoder_peak(folder, dtype.itemsize),
        )
    return taken


def needed_bytes(parts: Mapping[str, PartMemory], mode: MemoryMode) -> int:
    """Return what a mode needs on the device when one part works at a time; the text encoders come and go together."""
    if mode == "full":
        return sum(part.weights for part in parts.values()) + max(part.activations for part in parts.values())
    if mode == "sequential":
        return max(part.block + part.activations for part in parts.values())
    encoders = [part for name, part in parts.items() if name not in (TRANSFORMER, VAE)]
    beside = sum(part.weights for part in encoders)
    return max((beside if part in encoders else part.weights) + part.activations for part in parts.values())


def _block_bytes(folder: Path, dtype: torch.dtype) -> Counter[str]:
    """Return the bytes of each block by its name; "" holds what lies outside of all blocks."""
    sizes: Counter[str] = Counter()
    for name, tensor in stored_tensors(folder).items():
        block = BLOCK.match(name)
        sizes[block[1] if block else ""] += _loaded_bytes(tensor, dtype)
    return sizes


def _loaded_bytes(tensor: StoredTensor, dtype: torch.dtype) -> int:
    loaded = dtype if tensor.dtype.is_floating_point else tensor.dtype
    return tensor.num_elements * loaded.itemsize


@torch.no_grad()
def _sampling_peak(checkpoint: Checkpoint, dtype: torch.dtype, params: SamplingParams, batch_size: int) -> int:
    """Count the evaluation of the last unit at the last level, which has the most tokens."""
    transformer, schedule = checkpoint.empty_transformer().to(dtype), PyramidSchedule()
    num_levels = len(schedule.levels)
    text = TextEmbedding(
        tokens=torch.empty(batch_size, MAX_TOKENS, transformer.text_dim, device=META),
        mask=torch.ones(batch_size, MAX_TOKENS, dtype=torch.bool),
        pooled=torch.empty(batch_size, transformer.pooled_dim, device=META),
    )
    negative = text if params.guided else None
    scale = torch.empty(batch_size, 1, 1, 1, 1, device=META)
    no_cache = plan_cache(transformer, schedule, params, text, negative, cache=False)
    with live_peak() as peak:
        latents = torch.empty(params.latent_shape(batch_size, transformer.latent_channels), device=META)
        frame, *past = latents.split(1, dim=2)
        finished = [latent_pyramid(each, num_levels) for each in past]
        field = VelocityField(transformer, text, negative, no_cache)
        velocity = field.at(len(past), num_levels - 1, finished, frame.shape, scale)
        frame + velocity(frame, 0, 0.0, params.guided)
    return peak.bytes


@torch.no_grad()
def _vae_peak(
    checkpoint: Checkpoint, dtype: torch.dtype, params: SamplingParams, has_image: bool, window: int, tile: int | None
) -> int:
    """Count the first chunk, which is the longest, and the second, which meets what the first one left."""
    vae = checkpoint.empty_vae().to(dtype)
    with live_peak() as peak:
        if has_image:
            vae.encode_moments(torch.empty(1, 3, 1, params.height, params.width, device=META))
        latents = torch.empty(params.latent_shape(1, vae.latent_channels), dtype=dtype, device=META)
        chunks = [*temporal_chunks(latents, window)]
        for pixels in islice(vae.decode_stream(chunks, tile=tile), 2):
            quantized(pixels)
    return peak.bytes


@contextmanager
def live_peak() -> Iterator["_LiveTensors"]:
    """Count the bytes of tensors on the meta device that are live together, as if attention were fused."""
    with _FusedAttention(), _LiveTensors() as live:
        yield live


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed; `bytes` is the peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._live: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave the handler as it is; wrapped for `torch.compile`, it would import torch's compiler."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        out = _run(func, args, kwargs or {})
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if id(storage) not in given:  # else a view, perhaps of weights
                self._note(storage)
        copies = _layout_copies(*args[:2]) if func is torch.ops.aten.convolution.default else 0
        self.bytes = max(self.bytes, sum(self._live.values()) + copies)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._live:
            self._live[key] = storage.nbytes()
            finalize(storage, partial(self._live.pop, key))


def _run(func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
    """Run an operation; what it brings to host memory has no values there either."""
    if func is torch.ops.aten._to_copy.default and kwargs.get("device") == HOST and args[0].device == META:
        return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=HOST)
    return func(*args, **kwargs)


def _storages(values: Any) -> list[torch.UntypedStorage]:  # noqa: ANN401 - whatever an operation takes or gives
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.device == META]
    return [tensor.untyped_storage() for tensor in tensors]


def _layout_copies(x: Tensor, weight: Tensor) -> int:
    """Return the bytes that a convolution takes to bring its input and weight into its kernel's layout."""
    return x.numel() * x.element_size() + weight.numel() * weight.element_size()


class _FusedAttention(TorchFunctionMode):
    """Gives attention its output and the sums of a fused kernel; without it meta tensors take a matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
            return sums.new_empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype)
        return func(*args, **(kwargs or {}))
