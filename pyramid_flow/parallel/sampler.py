"""One batch of clips on several devices: the guidance branches apart, and the tokens of each sequence shared out.

Every process runs the same sampler on the same inputs, and a transformer evaluation is what they share. Between
attentions a process holds a share of every stream's tokens (text, history, current frame) with all heads; inside, it
holds all tokens with its share of the heads (DeepSpeed-Ulysses, arXiv:2309.14509), so the history cache is sharded by
heads, and who may attend to whom stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from pyramid_flow.parallel.config import BRANCHES, ParallelConfig

GUIDANCE, SEQUENCE = "guidance", "sequence"

Streams = tuple[int, ...]
"""Tokens of each part of a sequence: text, history, current frame. Each is shared out by itself."""


@dataclass(frozen=True)
class SequenceGroup:
    """Processes that share the tokens, or inside of attention the heads, of one sequence."""

    group: dist.ProcessGroup

    @cached_property
    def size(self) -> int:
        """Number of processes."""
        return self.group.size()

    @cached_property
    def rank(self) -> int:
        """This process' place among them."""
        return self.group.rank()

    def shares(self, num_tokens: int) -> list[int]:
        """Return how many tokens each process holds; they differ by one at most."""
        return [(rank + 1) * num_tokens // self.size - rank * num_tokens // self.size for rank in range(self.size)]

    def share(self, tokens: Tensor) -> Tensor:
        """Return this process' tokens of a stream: [B,S,D] -> [B,S',D]."""
        own: Tensor = tokens.split(self.shares(tokens.shape[1]), dim=1)[self.rank]
        return own

    def gather(self, share: Tensor, num_tokens: int) -> Tensor:
        """Return all tokens of a stream: [B,S',D] -> [B,S,D]."""
        batch, _, dim = share.shape
        received = self.exchange([share] * self.size, [(batch, own, dim) for own in self.shares(num_tokens)])
        return torch.cat(received, dim=1)

    def exchange(self, pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send one piece to each process, and return what each has sent, of the given shapes."""
        sent = torch.cat([piece.reshape(-1) for piece in pieces])
        sizes = [torch.Size(shape).numel() for shape in shapes]
        received = sent.new_empty(sum(sizes))
        width = sent.element_size()  # as bytes, since not every backend knows every type
        dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [width * size for size in sizes],
            [width * piece.numel() for piece in pieces],
            group=self.group,
        )
        return [flat.view(shape) for flat, shape in zip(received.split(sizes), shapes, strict=True)]


@dataclass(frozen=True)
class HeadExchange:
    """Turns shares of tokens into shares of heads around an attention, and back.

    only_last: whether only the last stream asks.
    """

    group: SequenceGroup
    streams: Streams
    only_last: bool = False

    def last(self) -> "HeadExchange":
        """Return the exchange in which only the last stream asks."""
        return replace(self, only_last=True)

    @property
    def asking(self) -> Streams:
        """How many tokens of each stream ask."""
        return (*(0 for _ in self.streams[:-1]), self.streams[-1]) if self.only_last else self.streams

    @property
    def num_queries(self) -> int:
        """Number of this process' tokens that ask."""
        return sum(self._shares(self.asking)[self.group.rank])

    def to_heads(self, *projected: Tensor) -> list[Tensor]:
        """Exchange q and k, v of one's own tokens, each [B,H,S',D], for those of all tokens: [B,H/n,S,D]."""
        batch, num_heads, _, dim = projected[0].shape
        heads = num_heads // self.group.size
        pieces = [
            torch.cat([tensor.reshape(-1) for tensor in each])
            for each in zip(*(tensor.split(heads, dim=1) for tensor in projected), strict=True)
        ]
        shares = [self._shares(self.asking), *[self._shares(self.streams)] * (len(projected) - 1)]
        lengths = [[sum(own[rank]) for own in shares] for rank in range(self.group.size)]
        width = batch * heads * dim
        received = self.group.exchange(pieces, [(width * sum(each),) for each in lengths])
        parts = [
            [flat.view(batch, heads, length, dim) for flat, length in zip(each.split(sizes), own, strict=True)]
            for each, own in zip(received, lengths, strict=True)
            for sizes in [[width * length for length in own]]
        ]
        return [_in_order(own, share, dim=2) for own, share in zip(zip(*parts, strict=True), shares, strict=True)]

    def to_tokens(self, mixed: Tensor) -> Tensor:
        """Exchange the outputs of one's own heads, [B,Q,H/n*D], for those of one's own tokens: [B,Q',H*D]."""
        shares = self._shares(self.asking)
        split = [
            stream.split(share, dim=1)
            for stream, share in zip(mixed.split(self.asking, dim=1), zip(*shares, strict=True), strict=True)
        ]
        pieces = [torch.cat(each, dim=1) for each in zip(*split, strict=True)]
        own = (mixed.shape[0], self.num_queries, mixed.shape[2])
        return torch.cat(self.group.exchange(pieces, [own] * self.group.size), dim=2)

    def _shares(self, streams: Streams) -> list[Streams]:
        """Return the tokens of each stream that each process holds."""
        return list(zip(*(self.group.shares(stream) for stream in streams), strict=True))


def _in_order(parts: Sequence[Tensor], shares: Sequence[Streams], dim: int) -> Tensor:
    """Join what processes hold to whole streams, one after another."""
    split = [part.split(share, dim=dim) for part, share in zip(parts, shares, strict=True)]
    return torch.cat([piece for stream in zip(*split, strict=True) for piece in stream], dim=dim)


@dataclass(frozen=True)
class Parallel:
    """This process' place among those that sample together. The default is a process that samples alone.

    They are called alike: with the same cached levels, and with the same answers of `on_step`.
    """

    config: ParallelConfig = field(default_factory=ParallelConfig)
    branches: dist.ProcessGroup | None = None
    sequence: SequenceGroup | None = None

    def own_branch(self, rows: Tensor) -> Tensor:
        """Return the rows of this process' guidance branch, of rows [2B] with the negative branch first."""
        return rows if self.branches is None else rows.chunk(BRANCHES)[self.branches.rank()]

    def all_branches(self, velocity: Tensor) -> Tensor:
        """Return the rows of both guidance branches, of what this process has predicted for its own."""
        if self.branches is None:
            return velocity
        both = [torch.empty_like(velocity) for _ in range(BRANCHES)]
        dist.all_gather(both, velocity.contiguous(), group=self.branches)
        return torch.cat(both)


SINGLE_PROCESS = Parallel()


def join(config: ParallelConfig, rank: int, device: torch.device, init_method: str) -> Parallel:
    """Meet the other processes (torch.distributed; ranks 0 ... config.size-1, each with its device).

    init_method: where they meet, as `torch.distributed.init_process_group` takes it.
    """
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=config.size)
    mesh = init_device_mesh(
        device.type, (config.cfg_degree, config.ulysses_degree), mesh_dim_names=(GUIDANCE, SEQUENCE)
    )
    return Parallel(
        config,
        mesh.get_group(GUIDANCE) if config.cfg_degree > 1 else None,
        SequenceGroup(mesh.get_group(SEQUENCE)) if config.ulysses_degree > 1 else None,
    )
