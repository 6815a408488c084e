"""Checkpoints: strict loading with errors that name the culprit, and a fingerprint of the weights."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyramid_flow import (
    CausalVideoVAE,
    Checkpoint,
    CheckpointError,
    InvalidValueError,
    Preset,
    PyramidDiffusionMMDiT,
    PyramidFluxTransformer,
)
from pyramid_flow.checkpoints.checkpoint import NETWORKS, load_model
from pyramid_flow.presets import PRESETS
from tests.pyramid_flow.goldens import TINY, TINY_MINIFLUX, TINY_SD3, tiny_transformer

DIT, VAE = "diffusion_transformer_384p", "causal_video_vae"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = {
    "miniflux": {DIT, VAE, "text_encoder", "text_encoder_2"},
    "sd3": {DIT, VAE, "text_encoder", "text_encoder_2", "text_encoder_3"},
}
TEXT_FOLDERS = [
    *(("miniflux", folder) for folder in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    *(("sd3", f"{kind}{number}") for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY_MINIFLUX, tmp_path / "checkpoint")


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], Path]:
    """Return what copies the tiny checkpoint of a family."""
    return lambda family: shutil.copytree(TINY[family], tmp_path / family)


def edit_tensors(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def reshard(folder: Path) -> None:
    """Save the transformer again in at least three files."""
    shutil.rmtree(folder / DIT)
    tiny_transformer().save_pretrained(folder / DIT, max_shard_size="200KB")
    assert len(list((folder / DIT).glob("*.safetensors"))) >= 3


def load(folder: Path, part: str) -> object:
    checkpoint = Checkpoint.open(folder)
    return {DIT: checkpoint.load_transformer, VAE: checkpoint.load_vae}[part](torch.float32, "cpu")


# Finding


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint folder .*/nowhere"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no folder diffusion_transformer_\*"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("variant", [None, "384p", DIT])
def test_a_variant_is_found_by_either_name(variant):
    checkpoint = Checkpoint.open(str(TINY_MINIFLUX), variant)
    assert (checkpoint.variant, checkpoint.transformer_folder.name) == ("384p", DIT)


def test_several_variants_are_listed(folder):
    shutil.copytree(folder / DIT, folder / "diffusion_transformer_768p")
    with pytest.raises(CheckpointError, match="several variants, choose one of: 384p, 768p"):
        Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="no variant 'image', it has: 384p, 768p"):
        Checkpoint.open(folder, "image")
    assert Checkpoint.open(folder, "768p").preset == PRESETS["miniflux"]["768p"]


@pytest.mark.parametrize(
    ("family", "transformer"), [("miniflux", PyramidFluxTransformer), ("sd3", PyramidDiffusionMMDiT)]
)
def test_the_transformers_class_decides_the_family(family, transformer):
    checkpoint = Checkpoint.open(TINY[family])
    assert checkpoint.family == family
    assert checkpoint.preset == PRESETS[family]["384p"]
    assert {folder.name for folder in checkpoint.folders} == MODELS[family]
    assert type(checkpoint.load_transformer(torch.float32, "cpu")) is transformer
    empty = checkpoint.empty_transformer()
    assert type(empty) is NETWORKS[family]
    assert issubclass(transformer, type(empty))
    assert empty.class_name == transformer.__name__
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}


def test_a_variant_of_another_name_has_its_familys_statistics(folder_of):
    folder = folder_of("sd3")
    (folder / DIT).rename(folder / "diffusion_transformer_mine")
    assert Checkpoint.open(folder).preset.statistics == PRESETS["sd3"]["384p"].statistics


def test_pyramid_json_wins_over_the_preset(folder):
    assert Checkpoint.open(folder).preset == PRESETS["miniflux"]["384p"]
    (folder / "pyramid.json").write_text('{"sizes": [[64, 64]], "max_num_frames": 9}')
    assert Checkpoint.open(folder).preset == Preset(sizes=((64, 64),), max_num_frames=9)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"size": [64, 64]}'])
def test_a_broken_pyramid_json_is_refused(folder, text):
    (folder / "pyramid.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"pyramid\.json"):
        _ = Checkpoint.open(folder).preset


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TINY)
def test_parts_load_ready_for_inference(family, dtype):
    checkpoint = Checkpoint.open(TINY[family])
    for part in (
        checkpoint.load_transformer(dtype, "cpu"),
        checkpoint.load_vae(dtype, "cpu"),
        checkpoint.load_text_encoder(dtype, "cpu"),
    ):
        assert {parameter.dtype for parameter in part.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(module.training for module in part.children())


def test_loaded_tensors_are_those_of_the_file():
    for file, model in (
        (TINY_MINIFLUX / DIT, PyramidFluxTransformer),
        (TINY_SD3 / DIT, PyramidDiffusionMMDiT),
        (TINY_MINIFLUX / VAE, CausalVideoVAE),
    ):
        state = load_model(model, file, torch.float32, "cpu").state_dict()
        expected = load_file(file / WEIGHTS)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], weight) for name, weight in expected.items())


def test_float16_is_refused_with_the_reason():
    checkpoint = Checkpoint.open(TINY_MINIFLUX)
    for load_part in (checkpoint.load_transformer, checkpoint.load_vae, checkpoint.load_text_encoder):
        with pytest.raises(InvalidValueError, match=r"torch_dtype torch.float16 .* bfloat16 or float32 .*overflows"):
            load_part(torch.float16, "cpu")


def test_a_sharded_folder_loads_equal(folder):
    reshard(folder)
    state = Checkpoint.open(folder).load_transformer(torch.float32, "cpu").state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in load_file(TINY_MINIFLUX / DIT / WEIGHTS).items())
    Checkpoint.open(folder).check()


@pytest.mark.parametrize("family", TINY)
def test_check_accepts_a_sound_checkpoint(family):
    Checkpoint.open(TINY[family]).check()


def test_positions_of_another_size_are_refused(folder_of):
    folder = folder_of("sd3")
    edit_json(folder / DIT / "config.json", pos_embed_max_size=32)
    with pytest.raises(CheckpointError, match=r"pos_embed has shape \[1, 576, 32\], expected \[1, 1024, 32\]"):
        Checkpoint.open(folder).check()


@pytest.mark.parametrize(("family", "missing"), TEXT_FOLDERS)
def test_check_names_a_missing_folder(folder_of, family, missing):
    folder = folder_of(family)
    shutil.rmtree(folder / missing)
    with pytest.raises(CheckpointError, match=rf"no folder {missing}$"):
        Checkpoint.open(folder).check()


@pytest.mark.parametrize("part", [DIT, VAE])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop(min(weights)), r"lacks the tensor {name} \[[\d, ]+\]"),
        (lambda weights: weights.update(extra=torch.ones(2, 3)), r"holds an unknown tensor extra \[2, 3\]"),
        (
            lambda weights: weights.update({min(weights): torch.ones(5)}),
            r"tensor {name} has shape \[5\], expected \[[\d, ]+\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, part, edit, message):
    name = min(load_file(folder / part / WEIGHTS))
    edit_tensors(folder / part / WEIGHTS, edit)
    for action in (lambda: load(folder, part), Checkpoint.open(folder).check):
        with pytest.raises(CheckpointError, match=part + ".*" + message.replace("{name}", name)):
            action()


@pytest.mark.parametrize("part", [DIT, VAE])
@pytest.mark.parametrize("missing", ["config.json", WEIGHTS, None])
def test_a_missing_file_or_folder_is_named(folder, part, missing):
    checkpoint = Checkpoint.open(folder)
    if missing is None:
        shutil.rmtree(folder / part)
    else:
        (folder / part / missing).unlink()
    for action in (checkpoint.load_transformer if part == DIT else checkpoint.load_vae, lambda *_: checkpoint.check()):
        with pytest.raises(CheckpointError, match=part):
            action(torch.float32, "cpu")


@pytest.mark.parametrize("part", [DIT, VAE])
def test_a_truncated_file_is_named(folder, part):
    file = folder / part / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=part):
        load(folder, part)


def test_a_missing_shard_is_named(folder):
    reshard(folder)
    shard = sorted((folder / DIT).glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        Checkpoint.open(folder).check()


def test_an_index_without_a_map_is_named(folder):
    reshard(folder)
    index = next((folder / DIT).glob("*.index.json"))
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=index.name):
        Checkpoint.open(folder).check()


ELSEWHERE = ["../outside.safetensors", "/etc/outside.safetensors", "..", "", "a\\b.safetensors", "a.bin", 7, None]


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("index", [f"{DIT}/{WEIGHTS}.index.json", "text_encoder/model.safetensors.index.json"])
def test_an_index_names_only_weight_files_of_its_folder(folder, name, index):
    weights = folder / index.removesuffix(".index.json")
    shutil.copy(weights, folder / "outside.safetensors")
    names = dict.fromkeys(load_file(weights), name)
    (folder / index).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"index\.json names the file"):
        Checkpoint.open(folder).check()


def test_an_index_that_only_transformers_reads_is_checked(folder):
    encoder = folder / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / WEIGHTS)
    index = {"weight_map": dict.fromkeys(load_file(encoder / WEIGHTS), "../outside.safetensors")}
    (encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names the file .\.\./outside\.safetensors., which is not a name"):
        Checkpoint.open(folder).load_text_encoder(torch.float32, "cpu")


def test_an_adapter_in_the_folder_of_a_text_encoder_is_refused(folder):
    (folder / "text_encoder_2/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="text_encoder_2 holds an adapter"):
        Checkpoint.open(folder).check()
    with pytest.raises(CheckpointError, match="text_encoder_2 holds an adapter"):
        Checkpoint.open(folder).load_text_encoder(torch.float32, "cpu")


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file"])
@pytest.mark.parametrize("name", ["../tokenizer_2/tokenizer.json", "/etc/passwd"])
def test_a_tokenizer_names_only_files_of_its_folder(folder, key, name):
    edit_json(folder / "tokenizer/tokenizer_config.json", **{key: name})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json names the file"):
        Checkpoint.open(folder).check()


@pytest.mark.parametrize(
    ("file", "values"),
    [
        (
            "tokenizer/tokenizer_config.json",
            {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["planted.T"] * 2}},
        ),
        ("tokenizer/config.json", {"model_type": "custom", "auto_map": {"AutoConfig": "planted.C"}}),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "planted.M", "AutoConfig": "planted.C"}}),
        (f"{DIT}/config.json", {"auto_map": {"AutoModel": "planted.M"}}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_in_a_checkpoint_is_never_run(folder, tmp_path, monkeypatch, file, values):
    monkeypatch.setattr("builtins.input", lambda question: "y")  # a terminal is asked, too
    path, ran = folder / file, tmp_path / "ran"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    (path.parent / "planted.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise SystemExit\n")
    with suppress(CheckpointError):
        load(folder, DIT)
        Checkpoint.open(folder).load_text_encoder(torch.float32, "cpu")
    assert not ran.exists()


def test_a_file_of_another_variant_beside_the_weights_is_ignored(folder):
    expected = Checkpoint.open(folder).fingerprint
    save_file({"other": torch.ones(1)}, folder / DIT / "diffusion_pytorch_model.fp16.safetensors")
    Checkpoint.open(folder).check()
    assert Checkpoint.open(folder).fingerprint == expected


def test_another_class_is_named(folder):
    with pytest.raises(CheckpointError, match="holds a PyramidDiffusionMMDiT, not a PyramidFluxTransformer"):
        load_model(PyramidFluxTransformer, TINY_SD3 / DIT, torch.float32, "cpu")
    edit_json(folder / DIT / "config.json", _class_name="FluxTransformer2DModel")
    known = "PyramidFluxTransformer or PyramidDiffusionMMDiT"
    for use in (lambda: load(folder, DIT), Checkpoint.open(folder).check, lambda: Checkpoint.open(folder).preset):
        with pytest.raises(CheckpointError, match=f"{DIT} holds a FluxTransformer2DModel, not a {known}"):
            use()
    shutil.copy(TINY_MINIFLUX / DIT / "config.json", folder / DIT)
    edit_json(folder / VAE / "config.json", _class_name="AutoencoderKL")
    with pytest.raises(CheckpointError, match=f"{VAE} holds a AutoencoderKL, not a CausalVideoVAE"):
        load(folder, VAE)


def test_an_unsupported_config_is_refused(folder):
    edit_json(folder / DIT / "config.json", use_temporal_causal=False)
    with pytest.raises(CheckpointError, match=r"config\.json describes no PyramidFluxTransformer: use_temporal_causal"):
        load(folder, DIT)


# Fingerprint


def test_fingerprint_is_16_hex_digits_of_the_content(folder):
    fingerprint = Checkpoint.open(folder).fingerprint
    assert len(fingerprint) == 16
    assert int(fingerprint, 16) >= 0
    assert fingerprint == Checkpoint.open(TINY_MINIFLUX).fingerprint


@pytest.mark.parametrize(("family", "part"), [(family, part) for family in TINY for part in sorted(MODELS[family])])
def test_one_changed_weight_changes_the_fingerprint(folder_of, family, part):
    folder = folder_of(family)
    before = Checkpoint.open(folder).fingerprint

    def nudge(weights: dict[str, Tensor]) -> None:
        weights[max(weights)].view(-1)[-1] += 1e-3

    edit_tensors(next((folder / part).glob("*.safetensors")), nudge)
    assert Checkpoint.open(folder).fingerprint != before


@pytest.mark.parametrize(
    "edit",
    [
        lambda weights: weights.update(proj_out_weight=weights.pop("proj_out.weight")),
        lambda weights: weights.update({"proj_out.weight": weights["proj_out.weight"].reshape(-1, 2)}),
        lambda weights: weights.update({"proj_out.weight": weights["proj_out.weight"].view(torch.int32)}),
    ],
)
def test_the_same_bytes_under_another_name_shape_or_type_change_the_fingerprint(folder, edit):
    before = Checkpoint.open(folder).fingerprint
    edit_tensors(folder / DIT / WEIGHTS, edit)
    assert Checkpoint.open(folder).fingerprint != before


def test_other_settings_are_another_fingerprint(folder):
    before = Checkpoint.open(folder).fingerprint
    (folder / "pyramid.json").write_text('{"statistics": {"later_shift": 0.5}}')
    assert Checkpoint.open(folder).fingerprint != before


def test_check_sees_a_broken_text_encoder(folder):
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        Checkpoint.open(folder).check()


def test_sharding_does_not_change_the_fingerprint(folder):
    before = Checkpoint.open(folder).fingerprint
    reshard(folder)
    assert Checkpoint.open(folder).fingerprint == before


def test_a_bfloat16_checkpoint_has_a_fingerprint_and_loads(folder):
    before = Checkpoint.open(folder).fingerprint
    edit_tensors(folder / DIT / WEIGHTS, lambda weights: weights.update({k: v.bfloat16() for k, v in weights.items()}))
    assert Checkpoint.open(folder).fingerprint != before
    loaded = Checkpoint.open(folder).load_transformer(torch.float32, "cpu").state_dict()
    for name, weight in tiny_transformer().state_dict().items():
        assert torch.equal(loaded[name], weight.bfloat16().float())
