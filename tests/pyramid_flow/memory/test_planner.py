"""What fits: auto takes the first mode and the largest tile whose bytes are there, and says so."""

import logging

import pytest
import torch

from pyramid_flow import Checkpoint, SamplingParams
from pyramid_flow.memory.modes import MODES
from pyramid_flow.memory.placement import Placement
from pyramid_flow.memory.planner import choose_placement, fitting_mode, fitting_tile
from pyramid_flow.memory.usage import PartMemory, needed_bytes, part_memory

PARTS = {  # full 2000 + 300, offload 1600 + 10, sequential 200 + 300
    "text_encoder": PartMemory(weights=1600, block=100, activations=10),
    "transformer": PartMemory(weights=300, block=200, activations=300),
    "vae": PartMemory(weights=100, block=50, activations=200),
}
ONE = {"vae": PARTS["vae"]}  # 300 in full and offload, 250 in sequential


@pytest.mark.parametrize(
    ("parts", "available", "mode"),
    [
        (PARTS, 10_000, "full"),
        (PARTS, 2300 / 0.9 + 1, "full"),
        (PARTS, 2300, "offload"),  # of which a tenth is left alone
        (PARTS, 1610 / 0.9 + 1, "offload"),
        (PARTS, 1610, "sequential"),
        (PARTS, 10, "sequential"),  # it does not fit either, but takes least
        (ONE, 300 / 0.9 + 1, "full"),
        (ONE, 300, "sequential"),  # offload needs as much as full, when there is one part
    ],
)
def test_the_first_mode_that_fits(parts, available, mode):
    assert fitting_mode(parts, available) == mode


@pytest.mark.parametrize(
    ("available", "tile"), [(1000, None), (1000 / 0.9 + 1, None), (700, 512), (200, 256), (100, 256)]
)
def test_the_largest_tile_that_fits(available, tile):
    assert fitting_tile(lambda side: {None: 900, 512: 600, 256: 150}[side], available) == tile


def test_auto_is_full_on_a_cpu(caplog):
    with caplog.at_level(logging.INFO):
        placement = choose_placement(Checkpoint.open("toy"), torch.float32, "cpu", "auto")
    assert placement == Placement(torch.device("cpu"), "full")
    [line] = caplog.messages
    assert line == "memory mode full: on a CPU there is nothing to move"


@pytest.mark.parametrize("mode", MODES)
def test_auto_counts_the_parts_it_is_asked_for_and_says_why(caplog, mode):
    checkpoint, parts = Checkpoint.open("toy"), ("transformer", "vae")
    params = SamplingParams(*checkpoint.preset.sizes[0], checkpoint.preset.max_num_frames)
    needs = part_memory(checkpoint, torch.bfloat16, params, has_image=True, tile=256, parts=parts)
    assert tuple(needs) == parts
    enough = int(needed_bytes(needs, mode) / 0.9) + 1
    with caplog.at_level(logging.INFO):
        placement = choose_placement(
            checkpoint, torch.bfloat16, "meta", "auto", parts=parts, tile=256, available=lambda device: enough
        )
    assert placement == Placement(torch.device("meta"), mode)
    [line] = caplog.messages
    assert line.startswith(f"memory mode {mode} for transformer+vae: needed are full ")


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_is_asked_for_is_taken(mode):
    placement = choose_placement(Checkpoint.open("toy"), torch.float32, "cpu", mode)
    assert placement == Placement(torch.device("cpu"), mode)
