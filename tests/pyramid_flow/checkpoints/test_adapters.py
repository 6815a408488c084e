"""Adapters in peft's format: what they add to a transformer, and clear errors for those that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyramid_flow import Checkpoint, CheckpointError, InvalidValueError
from pyramid_flow.checkpoints.adapters import Adapter, merge_adapters
from tests.pyramid_flow.goldens import TINY_MINIFLUX, save_adapter


def transformer():
    return Checkpoint.open(TINY_MINIFLUX).load_transformer(torch.float32, "cpu")


def delta(folder: Path, module: str, scale: float) -> torch.Tensor:
    weights = load_file(folder / "adapter_model.safetensors")
    a, b = (weights[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
    return scale * b @ a


def test_adapters_add_up_each_by_its_weight(tmp_path):
    first = save_adapter(transformer(), tmp_path / "first", seed=1, rank=2, alpha=6)
    second = save_adapter(transformer(), tmp_path / "second", seed=2, rank=4, alpha=4)
    plain, names = transformer(), ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp")
    expected = {
        name: plain.get_submodule(name).weight + delta(first, name, 0.5 * 6 / 2) + delta(second, name, -1.0)
        for name in names
    }
    made = merge_adapters(transformer(), [Adapter(first, 0.5), Adapter(second, -1.0)])
    assert type(made) is type(plain)
    assert made.state_dict().keys() == plain.state_dict().keys()
    for name in names:
        torch.testing.assert_close(made.get_submodule(name).weight, expected[name])
    untouched = "transformer_blocks.0.attn.to_k.weight"
    assert torch.equal(made.state_dict()[untouched], plain.state_dict()[untouched])


def test_a_checkpoint_with_adapters_is_another_model(tmp_path):
    folder = save_adapter(transformer(), tmp_path / "style", seed=1)
    plain = Checkpoint.open(TINY_MINIFLUX)
    made = Checkpoint.open(TINY_MINIFLUX, lora=[f"{folder}=0.5"])
    made.check()
    assert made.name == f"{plain.name} + style=0.5"
    name = "transformer_blocks.0.attn.to_q"
    weight = made.load_transformer(torch.float32, "cpu").get_submodule(name).weight
    torch.testing.assert_close(weight, transformer().get_submodule(name).weight + delta(folder, name, 0.5 * 6 / 2))
    again = Checkpoint.open(TINY_MINIFLUX, lora=made.lora)
    assert again == made
    fingerprints = {checkpoint.fingerprint for checkpoint in (plain, made, again)}
    fingerprints |= {Checkpoint.open(TINY_MINIFLUX, lora=[str(folder)]).fingerprint}
    assert len(fingerprints) == 3
    _reshaped(folder)
    with pytest.raises(CheckpointError, match=r"has shape \[3, 3\]"):
        made.check()
    assert again.fingerprint == made.fingerprint != Checkpoint.open(TINY_MINIFLUX, lora=made.lora).fingerprint


@pytest.mark.parametrize(
    ("text", "path", "weight"), [("style", "style", 1.0), ("a/b=0.5", "a/b", 0.5), ("a=b=-2", "a=b", -2.0)]
)
def test_an_adapter_is_named_with_its_weight(text, path, weight):
    assert Adapter.parse(text) == Adapter(Path(path).resolve(), weight)


@pytest.mark.parametrize("text", ["", "style=", "style=x", "=0.5", "style=nan", "style=inf"])
def test_a_weight_that_is_none_is_refused(text):
    with pytest.raises(InvalidValueError, match="is not PATH or PATH=WEIGHT"):
        Adapter.parse(text)


def test_one_adapter_needs_no_list(tmp_path):
    folder = save_adapter(transformer(), tmp_path / "style", seed=1)
    assert Checkpoint.open(TINY_MINIFLUX, lora=str(folder)).adapters == (Adapter(folder),)


def _without(name: str):
    return lambda folder: (folder / name).unlink()


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _edited(**values: object):
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def _reshaped(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: torch.zeros(3, 3)}, folder / "adapter_model.safetensors")


def _more(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights | {"other": torch.zeros(3)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_without("adapter_config.json"), "has no file adapter_config.json"),
        (_without("adapter_model.safetensors"), "has no file adapter_model.safetensors"),
        (_pickled, "has no file adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no tensors"), "cannot be read"),
        (_edited(target_modules=["nowhere"]), "does not fit the transformer"),
        (_edited(peft_type="ADALORA"), "is not a LoRA adapter but ADALORA"),
        (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "does not fit the transformer"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "does not fit the transformer"),
        (_edited(target_modules=["to_q"]), "holds an unknown tensor"),
        (_edited(target_modules=["to_q", "proj_mlp", "to_k"]), "lacks tensor"),
        (_edited(bias="all"), "sets bias, which is not supported"),
        (_edited(modules_to_save=["proj_out"]), "sets modules_to_save, which is not supported"),
        (_edited(use_dora=True), "sets use_dora, which is not supported"),
        (_reshaped, r"has shape \[3, 3\], expected"),
        (_more, "holds an unknown tensor other"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, broken, message):
    folder = save_adapter(transformer(), tmp_path / "style", seed=1)
    broken(folder)
    with pytest.raises(CheckpointError, match=message):
        merge_adapters(transformer(), [Adapter(folder)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "planted"}, "sets megatron_config, which is not supported"),
        ({"megatron_config": {"a": 1}, "megatron_core": "megatron.planted"}, "sets megatron_config"),
        ({"megatron_core": "planted"}, "sets megatron_core"),
        ({"corda_config": {"cache_file": "planted.pt"}}, "sets corda_config"),
        ({"eva_config": {"rho": 1}}, "sets eva_config"),
        ({"loftq_config": {"loftq_bits": 4}}, "sets loftq_config"),
        ({"layer_replication": [[0, 1]]}, "sets layer_replication"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"target_parameters": ["proj_out.weight"]}, "sets target_parameters"),
    ],
)
def test_a_config_that_makes_peft_import_or_load_more_is_refused(tmp_path, monkeypatch, values, message):
    folder = save_adapter(transformer(), tmp_path / "style", seed=1)
    imported = tmp_path / "imported"
    for module in ("planted", "megatron"):
        (tmp_path / f"{module}.py").write_text(f"open({str(imported)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    _edited(**values)(folder)
    with pytest.raises(CheckpointError, match=message):
        merge_adapters(transformer(), [Adapter(folder)])
    assert not imported.exists()


def test_the_model_that_an_adapter_was_trained_on_is_neither_imported_nor_loaded(tmp_path, monkeypatch):
    folder = save_adapter(transformer(), tmp_path / "style", seed=1)
    expected = merge_adapters(transformer(), [Adapter(folder)]).state_dict()
    imported = tmp_path / "imported"
    (tmp_path / "planted.py").write_text(f"open({str(imported)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Model", "parent_library": "planted"}
    _edited(auto_mapping=mapping, base_model_name_or_path="planted/model", revision="x", task_type="CAUSAL_LM")(folder)
    made = merge_adapters(transformer(), [Adapter(folder)]).state_dict()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert not imported.exists()
