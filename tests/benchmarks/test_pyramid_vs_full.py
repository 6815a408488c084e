"""The two methods that are compared: what each of them sees, and that one is the other with one level."""

import torch

from benchmarks.pyramid_vs_full import METHODS, most_tokens
from pyramid_flow.training.draws import KeyedRandom
from pyramid_flow.training.objective import temporal_pyramid_sample


def test_the_papers_count_of_tokens():
    assert most_tokens() == {"pyramid": 15_360, "full": 119_040}


def test_full_resolution_flows_from_noise_to_the_frame_with_all_of_its_history():
    latents = torch.randn(2, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draws = [KeyedRandom(0, 0, range(2)) for _ in range(2)]
    sample = temporal_pyramid_sample(METHODS["full"], 0, latents, draws[0])
    noise, ratio = draws[1].normal((16, 1, 8, 8)), sample.ratio.view(-1, 1, 1, 1, 1)
    frame = latents[:, :, -1:]
    torch.testing.assert_close(sample.noisy, ratio * noise + (1 - ratio) * frame)
    torch.testing.assert_close(sample.target, noise - frame)
    assert [tuple(clip.shape) for clip in sample.history] == [(2, 16, 1, 8, 8)] * 3
