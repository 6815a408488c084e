"""What a chaos test renders, and the blows that fall while it does: drawn from a seed before anything starts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

SHAPE = {"height": 64, "width": 64, "num_frames": 9}
BAD_SHAPE = SHAPE | {"height": 100}

Target = Literal["worker", "node", "driver"]


@dataclass(frozen=True)
class Scenario:
    """How much is rendered, on what, and how much goes wrong.

    rows, killers, bad, duplicates: rows that are fine, that kill their own worker, that cannot be rendered, and that
    repeat one that is fine; nodes: nodes with one GPU each, beside the head; samplers: workers that sample and decode;
    lives: runs of the driver, of which all but the last are killed; blows: other kills over all lives; targets: what
    these hit; faults: of the store; sample_s: seconds of one call of the sampler, at least and at most.
    """

    rows: int
    samplers: int
    nodes: int = 0
    killers: int = 0
    bad: int = 0
    duplicates: int = 0
    batch_size: int = 2
    lives: int = 1
    blows: int = 0
    targets: tuple[Target, ...] = ()
    faults: int = 0
    max_attempts: int = 3
    sample_s: tuple[float, float] = (0.3, 0.7)
    flush_rows: int = 10
    flush_seconds: float = 2.0

    @property
    def blows_per_life(self) -> int:
        """So many blows in one life that no innocent row can be hit as often as costs it its life."""
        return self.max_attempts - 1


@dataclass(frozen=True)
class Blow:
    """A kill: falls some seconds after a number of rows have come to a driver."""

    target: Target
    rows: int
    delay_s: float


def table_rows(scenario: Scenario, seed: int) -> list[dict[str, object]]:
    """Return the input in a random order, but with duplicates after what they repeat."""
    rng = Random(f"rows {seed}")
    rows: list[dict[str, object]] = [{"id": row_id, "prompt": "fine", **SHAPE} for row_id in fine_ids(scenario)]
    rows += [{"id": row_id, "prompt": "kill", **SHAPE} for row_id in killer_ids(scenario)]
    rows += [{"id": row_id, "prompt": "bad", **BAD_SHAPE} for row_id in bad_ids(scenario)]
    rows = [row | {"seed": number} for number, row in enumerate(rows)]
    rng.shuffle(rows)
    repeated = rng.sample([row for row in rows if row["prompt"] == "fine"], scenario.duplicates)
    return rows + repeated


def fine_ids(scenario: Scenario) -> list[str]:
    """Return the ids of the rows that must succeed."""
    return [f"fine{number:03d}" for number in range(scenario.rows)]


def killer_ids(scenario: Scenario) -> list[str]:
    """Return the ids of the rows that kill their worker."""
    return [f"kill{number}" for number in range(scenario.killers)]


def bad_ids(scenario: Scenario) -> list[str]:
    """Return the ids of the rows that cannot be rendered."""
    return [f"bad{number}" for number in range(scenario.bad)]


def draw_lives(scenario: Scenario, seed: int) -> list[list[Blow]]:
    """Return the blows of each life of the driver, in order; every life but the last ends with the driver's death."""
    rng = Random(f"blows {seed}")
    last = int(0.8 * scenario.rows)
    part = last // scenario.lives
    deaths = [life * part + rng.randint(-part // 4, part // 4) for life in range(1, scenario.lives)]
    shares = _shares(rng, scenario)
    lives = []
    for begin, end, count in zip([0, *deaths], [*deaths, last], shares, strict=True):
        blows = [Blow(rng.choice(scenario.targets), rng.randint(begin, end), rng.uniform(0, 1)) for _ in range(count)]
        lives.append(sorted(blows, key=lambda blow: blow.rows))
    for life, death in zip(lives, deaths, strict=False):
        life.append(Blow("driver", death, rng.uniform(0, 1)))
    return lives


def _shares(rng: Random, scenario: Scenario) -> list[int]:
    """Deal the blows out to the lives."""
    places = [life for life in range(scenario.lives) for _ in range(scenario.blows_per_life)]
    chosen = rng.sample(places, scenario.blows)
    return [chosen.count(life) for life in range(scenario.lives)]


def latent_bytes(row_id: str, seed: int) -> bytes:
    """Return what the sampler makes of a row."""
    return hashlib.sha512(f"latents {row_id} {seed}".encode()).digest()


def video_bytes(row_id: str, seed: int) -> bytes:
    """Return what the decoder makes of a row: so much that it lives in the store of its node, and is lost with it."""
    return hashlib.sha512(f"video {row_id} {seed}".encode()).digest() * 2000


def ids_by_prompt(rows: Sequence[dict[str, object]], prompt: str) -> dict[str, int]:
    """Return the ids of the rows with a prompt, each with its seed."""
    return {str(row["id"]): int(str(row["seed"])) for row in rows if row["prompt"] == prompt}
