"""Peak of a text encoder's activations, estimated from its config.json: transformers itself is slow to import."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramid_flow.checkpoints.layout import CONFIG_FILE
from pyramid_flow.checkpoints.weight_files import read_json
from pyramid_flow.errors import CheckpointError
from pyramid_flow.text.embedding import MAX_TOKENS, POOLED_MAX_TOKENS

PROMPTS = 2
"""Encoded together: the prompt and the negative prompt."""

FLOAT32_BYTES, INT64_BYTES, BOOL_BYTES = 4, 8, 1

ACTIVATION_COPIES = {"relu": 2, "gelu": 2, "silu": 2, "quick_gelu": 3, "gelu_new": 4}
"""Tensors of the feed-forward width that are live together while transformers computes an activation function."""

UNKNOWN_ACTIVATION_COPIES = 4

T5_DEFAULTS = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8}
CLIP_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048}
"""What transformers assumes for a size that a config does not have."""


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a text encoder.

    hidden, inner, feed_forward: values per token of the hidden states, of all heads' queries, and inside of the
    feed-forward. activation: name of its function. gated: whether a second projection is multiplied with it.
    biased_heads: heads with a position bias per pair of tokens, 0 = none. tokens: of a prompt.
    """

    hidden: int
    inner: int
    feed_forward: int
    activation: str
    gated: bool
    biased_heads: int
    tokens: int


def encoder_peak(folder: Path, itemsize: int) -> int:
    """Return the peak of a text encoder's activations in bytes while two prompts of full length are encoded.

    It is the largest of a layer's phases, each the sum of its live tensors. With h, q and f for the bytes of hidden
    states, queries and feed-forward of all tokens, and b for the position bias (T5 only), they are

    - attention: 3 h + 5 q + 2 b: input, normalised input, residual; queries, keys, values, output and its copy by
      token; the bias and the mask made of it. The scores stay inside of the fused kernel;
    - feed-forward: 4 h + b + the copies of f for its activation, or 5 h + b + 3 f for the product of a gated one;
    - T5's normalisation: 3 h + b + two float32 copies of h;
    - T5's position buckets: 2 h + 3 q + six int64 matrices and a bool one over pairs of tokens.

    Args:
        folder: of the encoder, with its config.json.
        itemsize: bytes of a value of the data type in which it computes.

    Raises:
        CheckpointError: the config cannot be read, or its `model_type` is neither t5 nor clip_text_model.
    """
    sizes = _read_sizes(folder)
    tokens = PROMPTS * sizes.tokens
    pairs = sizes.tokens**2
    hidden, inner, feed_forward = (tokens * each * itemsize for each in (sizes.hidden, sizes.inner, sizes.feed_forward))
    bias = sizes.biased_heads * pairs * itemsize
    copies = ACTIVATION_COPIES.get(sizes.activation, UNKNOWN_ACTIVATION_COPIES)
    phases = [
        3 * hidden + 5 * inner + 2 * bias,
        4 * hidden + bias + copies * feed_forward,
    ]
    if sizes.gated:
        phases.append(5 * hidden + bias + 3 * feed_forward)
    if sizes.biased_heads:
        positions = 2 * INT64_BYTES * sizes.tokens
        phases.append(3 * hidden + bias + 2 * FLOAT32_BYTES * tokens * sizes.hidden)
        phases.append(2 * hidden + 3 * inner + (6 * INT64_BYTES + BOOL_BYTES) * pairs + positions)
    return max(phases) + INT64_BYTES * tokens  # the token ids


def _read_sizes(folder: Path) -> _Sizes:
    config = read_json(folder / CONFIG_FILE)
    kind = config.get("model_type")
    if kind == "t5":
        return _t5_sizes(folder, config)
    if kind == "clip_text_model":
        return _clip_sizes(folder, config)
    raise CheckpointError(f"{folder} holds a text encoder of type {kind!r}; supported are 't5' and 'clip_text_model'")


def _t5_sizes(folder: Path, config: Mapping[str, Any]) -> _Sizes:
    hidden, head_dim, feed_forward, heads = (_size(folder, config, name, T5_DEFAULTS) for name in T5_DEFAULTS)
    projection = str(config.get("feed_forward_proj", "relu"))
    activation = projection.removeprefix("gated-")
    return _Sizes(
        hidden=hidden,
        inner=heads * head_dim,
        feed_forward=feed_forward,
        activation="gelu_new" if projection == "gated-gelu" else activation,  # as transformers reads it
        gated=projection != activation,
        biased_heads=heads,
        tokens=MAX_TOKENS,
    )


def _clip_sizes(folder: Path, config: Mapping[str, Any]) -> _Sizes:
    hidden, feed_forward = (_size(folder, config, name, CLIP_DEFAULTS) for name in CLIP_DEFAULTS)
    return _Sizes(
        hidden=hidden,
        inner=hidden,
        feed_forward=feed_forward,
        activation=str(config.get("hidden_act", "quick_gelu")),
        gated=False,
        biased_heads=0,
        tokens=POOLED_MAX_TOKENS,
    )


def _size(folder: Path, config: Mapping[str, Any], name: str, defaults: Mapping[str, int]) -> int:
    value = config.get(name, defaults[name])
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {name} is {value!r}, expected a positive integer")
    return value
