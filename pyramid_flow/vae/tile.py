"""The tiles in which the VAE decodes a frame to save memory."""

from typing import Literal

from pyramid_flow.errors import InvalidValueError
from pyramid_flow.sampling.params import SPATIAL_FACTOR

Tile = int | Literal["auto"] | None
"""Side of a VAE tile in pixels; None = no tiling, auto = the largest that fits into the free memory."""

TILE_MULTIPLE = 4 * SPATIAL_FACTOR
"""A tile is a whole number of latents, and so is the quarter of it that overlaps the next."""


def check_tile(tile: int | None) -> None:
    """Raise InvalidValueError unless a tile's side in pixels can be decoded, or there is no tile."""
    if tile is not None and (not isinstance(tile, int) or tile < TILE_MULTIPLE or tile % TILE_MULTIPLE):
        raise InvalidValueError("tile", tile, f"is not a positive multiple of {TILE_MULTIPLE}")
