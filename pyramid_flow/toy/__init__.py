"""A model small enough for a laptop's CPU. Today it has random weights: its videos are coloured noise."""

from pyramid_flow.toy.random import write_random_checkpoint

__all__ = ["write_random_checkpoint"]
