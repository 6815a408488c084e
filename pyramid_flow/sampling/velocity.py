"""The guided velocity of a batch of videos, and what stays the same from step to step or from unit to unit."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyramid_flow.parallel.sampler import SINGLE_PROCESS, Parallel
from pyramid_flow.sampling.pyramid import history_clips
from pyramid_flow.text.embedding import TextEmbedding, concatenate
from pyramid_flow.transformer.history_cache import HistoryCache
from pyramid_flow.transformer.model import Conditioning, PyramidTransformer

Velocity = Callable[[Tensor, int, float, bool], Tensor]
"""From the current frame [B,C,1,h,w], the number of the step, its timestep and whether it is guided."""


class VelocityField:
    """v_neg + scale (v_pos - v_neg), or v_pos alone where a step is not guided.

    Both branches go as one batch, or each to its own processes; a step that is not guided they all take alike.

    Computed once per prompt: its embedding; once per prompt and timestep: conditioning and all modulations; once per
    unit and level: embedded history and rotary angles; and what `cache` holds.
    """

    def __init__(
        self,
        transformer: PyramidTransformer,
        text: TextEmbedding,
        negative: TextEmbedding | None,
        cache: HistoryCache,
        parallel: Parallel = SINGLE_PROCESS,
    ) -> None:
        """text, negative: one row per video; negative may be None if no step is guided."""
        self.transformer, self.cache, self.parallel = transformer, cache, parallel
        prompts = transformer.embed_text(text if negative is None else concatenate([negative, text]))
        rows = torch.arange(len(prompts.pads))
        self.text = prompts if negative is None else prompts.select(parallel.own_branch(rows))
        self.positive = prompts.select(rows[-len(text) :])
        self._conditionings: dict[int, dict[int, Conditioning]] = {}

    def at(
        self,
        unit: int,
        level: int,
        finished: Sequence[tuple[Tensor, ...]],
        current: Sequence[int],
        scale: Tensor,
    ) -> Velocity:
        """Return the velocity of a unit at a level; it keeps what later steps and units can use.

        finished: `latent_pyramid` of each past frame; current: shape [B,C,1,h,w]; scale: guidance [B,1,1,1,1].
        """
        history = self.transformer.embed_history(
            history_clips(finished, level), current, self.text, self.cache.num_frames(unit, level)
        )
        # The first unit has steps of its own, each of which is taken once.
        conditionings = self._conditionings.setdefault(level, {}) if unit else {}

        def velocity(latents: Tensor, step: int, timestep: float, is_guided: bool) -> Tensor:
            text = self.text if is_guided else self.positive
            rows = len(text.pads)
            if step not in conditionings:
                times = torch.full((rows,), timestep, dtype=torch.float32, device=latents.device)
                conditionings[step] = self.transformer.condition(times, text, ahead=True)
            cached = self.cache.step(unit, level, step, rows)
            frames = latents.repeat(rows // len(latents), 1, 1, 1, 1)
            predicted: Tensor = self.transformer(
                frames, conditionings[step], text, history, cached, self.parallel.sequence
            ).float()
            if not is_guided:
                return predicted
            negative, positive = self.parallel.all_branches(predicted).chunk(2)
            return negative + scale * (positive - negative)

        return velocity

    def keep(self, videos: Tensor) -> None:
        """Keep only the videos for which a bool mask [B] is true; what `at` returned before is of no use any more."""
        rows = videos.repeat(len(self.text.pads) // len(videos)).nonzero().flatten()
        self.text, self.positive = self.text.select(rows), self.positive.select(videos.nonzero().flatten())
        self.cache.keep(videos)
        self._conditionings.clear()
