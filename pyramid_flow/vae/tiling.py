"""Spatial tiles: where they start, and how overlapping results are blended. Tiles overlap by a quarter.

Tiling bounds memory but is not exact: normalisation and attention see one tile at a time.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def tile_origins(size: int, tile: int) -> range:
    """Where the tiles of an axis of `size` start: every three quarters of a tile, so the last ones are shorter."""
    return range(0, size, tile * 3 // 4)


def split_tiles(x: Tensor, tile: int) -> Iterator[list[Tensor]]:
    """Views of x [...,H,W] of at most tile x tile, row by row."""
    height, width = x.shape[-2:]
    for top in tile_origins(height, tile):
        yield [x[..., top : top + tile, left : left + tile] for left in tile_origins(width, tile)]


def blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """Fade from the end of `before` to the start of `after` along `dim`; the result replaces `after`.

    b[y] = a[y-m] (1 - y/m) + b[y] y/m for y < m, with m = min(both sizes, extent).
    """
    m = min(before.shape[dim], after.shape[dim], extent)
    shape = [1] * after.ndim
    shape[dim] = m
    weight = (torch.arange(m, dtype=after.dtype, device=after.device) / m).view(shape)
    faded = before.narrow(dim, before.shape[dim] - m, m).lerp(after.narrow(dim, 0, m), weight)
    return torch.cat([faded, after.narrow(dim, m, after.shape[dim] - m)], dim)


def blend_tiles(rows: Iterable[Iterable[Tensor]], tile: int) -> Tensor:
    """Join overlapping tiles [...,h,w], row by row, into one tensor [...,H,W].

    Each tile is blended with the one above, then with the one on its left, both already blended over their whole
    area; only then is it cropped to its first three quarters. At most two rows of tiles are held.
    """
    extent = tile // 4
    keep = tile - extent
    above: list[Tensor] = []
    bands = []
    for row in rows:
        blended: list[Tensor] = []
        for column, current in enumerate(row):
            if above:
                current = blend(above[column], current, extent, dim=-2)
            if blended:
                current = blend(blended[-1], current, extent, dim=-1)
            blended.append(current)
        bands.append(torch.cat([current[..., :keep, :keep] for current in blended], dim=-1))
        above = blended
    return torch.cat(bands, dim=-2)


def map_tiles(function: Callable[[Tensor], Tensor], x: Tensor, sides: tuple[int, int] | None) -> Tensor:
    """Apply `function` to each tile of x [...,H,W] in row-major order and blend the results.

    `sides` are those of a tile before and after `function`. Without them, or when neither H nor W exceeds one tile,
    this is function(x).
    """
    if sides is None or max(x.shape[-2:]) <= sides[0]:
        return function(x)
    return blend_tiles(((function(part) for part in row) for row in split_tiles(x, sides[0])), sides[1])
