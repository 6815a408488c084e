"""Tokens: order inside a patch, interpolated positions, and the prefixes of a mixed-resolution sequence."""

import pytest
import torch
import torch.nn.functional as F

from pyramid_flow.transformer.tokens import interpolated_positions, patchify, position_ids, prefix_layout, unpatchify
from tests.pyramid_flow.goldens import randn


def test_patches_hold_row_column_channel_with_the_channel_fastest():
    latents = randn(2, 3, 2, 4, 6)
    tokens = patchify(latents)
    assert tokens.shape == (2, 2 * 2 * 3, 12)
    for frame in range(2):
        for y in range(4):
            for x in range(6):
                token = tokens[:, (frame * 2 + y // 2) * 3 + x // 2]
                first = ((y % 2) * 2 + x % 2) * 3
                assert torch.equal(token[:, first : first + 3], latents[:, :, frame, y, x])


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 10), (10, 4)])
def test_unpatchify_is_the_inverse(height, width):
    latents = randn(2, 5, 1, height, width)
    assert torch.equal(unpatchify(patchify(latents), height, width), latents)


@pytest.mark.parametrize(
    ("count", "current", "expected"),
    [
        (4, 4, [0, 1, 2, 3]),
        (3, 6, [0.5, 2.5, 4.5]),
        (2, 8, [1.5, 5.5]),
        (1, 4, [1.5]),
        (1, 1, [0]),
    ],
)
def test_positions_of_coarser_clips(count, current, expected):
    assert interpolated_positions(count, current).tolist() == expected


@pytest.mark.parametrize("current", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12])
def test_positions_are_a_linear_interpolation_with_half_pixel_centres(count, current):
    grid = torch.arange(current, dtype=torch.float64)[None, None]
    expected = F.interpolate(grid, size=count, mode="linear", align_corners=False)[0, 0]
    torch.testing.assert_close(interpolated_positions(count, current), expected)


def test_position_ids_count_frames_over_all_clips():
    ids = position_ids([(2, 2, 4), (1, 4, 8), (1, 4, 8)], text_length=3)
    text, rest = ids[:3], ids[3:].tolist()
    assert ids.dtype == torch.float64
    assert text.tolist() == [[0, 0, 0]] * 3
    coarse = [[frame, 0.5, x] for frame in (0, 1) for x in (0.5, 2.5)]
    fine = [[frame, y, x] for frame in (2, 3) for y in (0, 1) for x in range(4)]
    assert rest == coarse + fine


def test_clip_boundaries_between_equal_levels_do_not_matter():
    joined, apart = [(3, 2, 4), (1, 4, 8)], [(2, 2, 4), (1, 2, 4), (1, 4, 8)]
    assert torch.equal(position_ids(joined, 5), position_ids(apart, 5))
    assert prefix_layout(joined, 5) == prefix_layout(apart, 5)


def test_prefixes_begin_with_text_and_frame_0_and_end_with_each_frame():
    layout = prefix_layout([(2, 2, 4), (1, 4, 8), (1, 8, 16)], text_length=7)
    assert layout.query_lengths == (7 + 2, 2, 8, 32)
    assert layout.key_ends == (9, 11, 19, 51)
    assert layout.num_queries == 51


def test_without_history_everything_sees_everything():
    layout = prefix_layout([(1, 4, 4)], text_length=7)
    assert (layout.query_lengths, layout.key_ends) == ((11,), (11,))


def test_current_only_asks_for_the_last_frame_and_sees_all():
    layout = prefix_layout([(2, 2, 4), (1, 4, 8)], text_length=7).current_only(8)
    assert (layout.query_lengths, layout.key_ends) == ((8,), (19,))
    assert layout.num_queries == 8
