"""Memory: weights equal those of loaded parts, activations what the CPU's allocator has seen, modes add up."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pyramid_flow import CausalVideoVAE, Checkpoint, CheckpointError, SamplingParams, SeededNoise, generate_latents
from pyramid_flow.checkpoints.checkpoint import BUNDLED
from pyramid_flow.memory.modes import MODES
from pyramid_flow.memory.usage import PartMemory, needed_bytes, part_bytes, part_memory
from pyramid_flow.pixels import decode_frames
from pyramid_flow.sampling.schedule import PyramidSchedule
from pyramid_flow.text.embedding import TextEmbedding
from tests.pyramid_flow.goldens import TINY_MINIFLUX, manifest

PARAMS = SamplingParams(128, 128, 17, 1, 1)
WIDE = (64, 128, 128, 128)
"""Channels of a VAE whose convolutions take the CPU's usual kernels; those of tiny ones hold im2col matrices."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread: on tensors this small more are slower, and far slower on a machine that is not idle."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy() -> Checkpoint:
    return Checkpoint.open("toy")


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Checkpoint, CausalVideoVAE]:
    """Return the bundled model with a larger VAE, in float32 and without its weights in the folder."""
    root = shutil.copytree(BUNDLED["toy"], tmp_path / "wide")
    vae: CausalVideoVAE = CausalVideoVAE(encoder_block_out_channels=WIDE, decoder_block_out_channels=WIDE)
    vae.save_pretrained(root / "causal_video_vae")
    return Checkpoint.open(root), vae.eval()


def measured(run: Callable[[], object]) -> int:
    """Return the peak of what the CPU's allocator has given out while `run` runs."""
    with torch.no_grad(), profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def loaded_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


# Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["toy", TINY_MINIFLUX])
def test_weights_take_what_loaded_parts_take(model, dtype):
    checkpoint = Checkpoint.open(model)
    text = checkpoint.load_text_encoder(dtype, "cpu")
    assert part_bytes(checkpoint, dtype) == {
        "text_encoder": loaded_bytes(text.clips[0]),
        "text_encoder_2": loaded_bytes(text.t5),
        "transformer": loaded_bytes(checkpoint.load_transformer(dtype, "cpu")),
        "vae": loaded_bytes(checkpoint.load_vae(dtype, "cpu")),
    }


def test_a_block_is_one_layer_and_what_lies_outside_of_layers(toy):
    transformer = toy.load_transformer(torch.bfloat16, "cpu")
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    outside = loaded_bytes(transformer) - sum(map(loaded_bytes, blocks))
    expected = outside + max(map(loaded_bytes, blocks))
    assert part_memory(toy, torch.bfloat16, PARAMS)["transformer"].block == expected


def test_a_published_transformer_is_counted_from_its_header_alone(tmp_path):
    root = shutil.copytree(BUNDLED["toy"], tmp_path / "published")
    published, offset, header = manifest("diffusion_transformer (miniflux)"), 0, {}
    for name, (shape, _) in published["tensors"].items():
        size = 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (root / "diffusion_transformer_toy" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)  # a hole: 7.9 GB that take no disk
    assert part_bytes(Checkpoint.open(root), torch.bfloat16)["transformer"] == 2 * published["parameters"]


# Activations: within 5 % of what is measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [{}, {"height": 192, "num_frames": 9}, {"guidance_scale": 0.0}])
def test_sampling_takes_what_the_widest_evaluation_takes(toy, dtype, change):
    params, transformer = replace(PARAMS, **change), toy.load_transformer(dtype, "cpu")
    text = TextEmbedding(torch.zeros(1, 128, 64), torch.ones(1, 128, dtype=torch.bool), torch.zeros(1, 64))

    def sample() -> None:
        generate_latents(transformer, PyramidSchedule(), text, text, params, SeededNoise([0]), cache=False)

    expected = part_memory(toy, dtype, params)["transformer"].activations
    assert expected == pytest.approx(measured(sample), rel=0.05)


@pytest.mark.integration  # seconds of profiling
@pytest.mark.parametrize("window", [1, 2])
def test_decoding_takes_what_its_first_chunks_take(wide, window):
    checkpoint, vae = wide
    latents = torch.zeros(1, 16, 1 + 2 * window, 8, 16)
    measured_bytes = measured(lambda: list(decode_frames(vae, latents, checkpoint.preset.statistics, window=window)))
    parts = part_memory(checkpoint, torch.float32, SamplingParams(64, 128, 33), window=window)
    assert parts["vae"].activations == pytest.approx(measured_bytes, rel=0.05)


@pytest.mark.integration  # seconds of profiling
def test_what_tiles_leave_for_their_next_chunk_is_in_host_memory(wide):
    checkpoint, vae = wide
    latents = torch.zeros(1, 16, 3, 8, 16)
    measured_bytes = measured(lambda: list(decode_frames(vae, latents, checkpoint.preset.statistics, tile=96)))
    _, state = vae.decode_chunk(latents[:, :, :2], None, tile=96)
    waiting = sum(feature.nbytes for features in state.features for feature in features.values())

    def taken(width: int) -> int:
        return part_memory(checkpoint, torch.float32, SamplingParams(64, width, 33), tile=96)["vae"].activations

    assert measured_bytes - 2 * waiting < taken(128) < measured_bytes - waiting / 4  # here it is all one memory
    assert 0 < taken(640) - taken(128) < waiting / 4  # the pixels of more tiles, not what those remember


def test_encoding_prompts_takes_what_is_measured(toy):
    text = toy.load_text_encoder(torch.float32, "cpu")
    parts = part_memory(toy, torch.float32, PARAMS)
    ids = torch.zeros(2, 128, dtype=torch.long)
    assert parts["text_encoder_2"].activations == pytest.approx(measured(lambda: text.t5(input_ids=ids)), rel=0.05)
    ids = torch.zeros(2, 77, dtype=torch.long)
    assert parts["text_encoder"].activations == pytest.approx(measured(lambda: text.clips[0](input_ids=ids)), rel=0.05)


def test_activations_grow_with_the_work(toy):
    def activations(part: str, params: SamplingParams = PARAMS, **how: int) -> int:
        return part_memory(toy, torch.bfloat16, params, **how)[part].activations

    base = activations("transformer")
    assert base < activations("transformer", replace(PARAMS, num_frames=65))
    assert base < activations("transformer", replace(PARAMS, width=256))
    assert activations("transformer", batch_size=3) == pytest.approx(3 * base, rel=0.05)
    assert activations("vae", tile=64) < activations("vae") < activations("vae", window=2)
    assert activations("vae", replace(PARAMS, num_frames=1)) < activations("vae")


# Modes


def test_a_mode_needs_what_it_holds_at_once():
    parts = {
        "transformer": PartMemory(weights=100, block=30, activations=5),
        "vae": PartMemory(weights=60, block=10, activations=50),
    }
    assert [needed_bytes(parts, mode) for mode in MODES] == [210, 110, 60]
    encoders = {
        "text_encoder": PartMemory(weights=40, block=20, activations=1),
        "text_encoder_2": PartMemory(weights=80, block=10, activations=2),
    }
    assert [needed_bytes(parts | encoders, mode) for mode in MODES] == [330, 122, 60]  # encoders are there together


def test_every_mode_needs_less_than_the_one_before(toy):
    parts = part_memory(toy, torch.bfloat16, PARAMS)
    full, offload, sequential = (needed_bytes(parts, mode) for mode in MODES)
    assert full > offload > sequential > 0


def test_an_unsupported_text_encoder_is_named(wide):
    checkpoint, _ = wide
    (checkpoint.root / "text_encoder" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(
        CheckpointError,
        match="text_encoder holds a text encoder of type 'bert'",
    ):
        part_memory(checkpoint, torch.float32, PARAMS)
