"""What a new user gets wrong: one sentence from the pipeline and from every command, never a traceback."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from jobs import cli
from pipeline.stages.encode import Encode
from pipeline.stages.model import ModelConfig
from pyramid_flow import PyramidFlowError, PyramidFlowPipeline
from tests.pipeline.sample_tables import batch, item, write_table
from tests.pyramid_flow.goldens import TINY_MINIFLUX

DIT, VAE = "diffusion_transformer_384p", "causal_video_vae"
SHORT = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1, "video_num_inference_steps": 1}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()


def pickle_only(folder: Path) -> None:
    """Leave the weights that some checkpoints come with in place of safetensors."""
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def as_diffusers(folder: Path) -> None:
    """Rename the folders as pipelines of diffusers have them."""
    (folder / DIT).rename(folder / "transformer")
    (folder / VAE).rename(folder / "vae")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def sentence(text: str, words: str) -> None:
    assert words in text
    assert len(text.strip().splitlines()) == 1
    assert "Traceback" not in text


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no checkpoint folder"),
    "an empty folder": (lambda f: [shutil.rmtree(f), f.mkdir()], "has no folder diffusion_transformer_*"),
    "of diffusers": (as_diffusers, "has no folder diffusion_transformer_*, as published checkpoints have"),
    "another model": (lambda f: edit_config(f / DIT, _class_name="FluxTransformer2DModel"), "a FluxTransformer2DModel"),
    "a config of nonsense": (lambda f: edit_config(f / DIT, num_layers="two"), "describes no PyramidFluxTransformer"),
    "a pickled transformer": (lambda f: pickle_only(f / DIT), "only pickled weights (*.bin), which are never read"),
    "a pickled encoder": (lambda f: pickle_only(f / "text_encoder"), "only pickled weights (*.bin)"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no folder"),
    "no vocabulary": (lambda f: (f / "tokenizer_2/tokenizer.json").unlink(), "has no vocabulary: tokenizer.json"),
    "no VAE": (lambda f: shutil.rmtree(f / VAE), f"{VAE} has no config.json"),
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "in.parquet", [{"prompt": "x"}])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY_MINIFLUX, tmp_path / "checkpoint")


def rendering(table: Path, folder: Path, *more: str) -> list[str]:
    return ["--input", str(table), "--output", str(table.parent / "out"), "--model", str(folder), *more]


@pytest.mark.parametrize("mistake", CHECKPOINTS)
def test_a_checkpoint_that_is_none_is_one_sentence_everywhere(mistake, folder, table, capsys, caplog):
    break_it, words = CHECKPOINTS[mistake]
    break_it(folder)
    with pytest.raises(PyramidFlowError) as caught:
        PyramidFlowPipeline.from_pretrained(folder)
    sentence(str(caught.value), words)
    capsys.readouterr()  # bars of what was loaded before
    assert cli.main(["inspect", str(folder)]) == 2
    sentence(capsys.readouterr().err, words)
    caplog.clear()
    assert cli.main(["render", *rendering(table, folder)]) == 2
    sentence(caplog.text, words)
    assert not (table.parent / "out").exists()


@pytest.mark.parametrize(
    ("variant", "words"),
    [(None, "several variants, choose one of: 384p, 768p"), ("image", "no variant 'image', it has: 384p, 768p")],
)
def test_an_unclear_variant_is_one_sentence(variant, words, folder, table, caplog):
    shutil.copytree(folder / DIT, folder / "diffusion_transformer_768p")
    with pytest.raises(PyramidFlowError) as caught:
        PyramidFlowPipeline.from_pretrained(folder, variant)
    sentence(str(caught.value), words)
    assert cli.main(["render", *rendering(table, folder, *(["--variant", variant] if variant else []))]) == 2
    sentence(caplog.text, words)


def test_float16_is_one_sentence(table, capsys):
    with pytest.raises(PyramidFlowError) as caught:
        PyramidFlowPipeline.from_pretrained(TINY_MINIFLUX, torch_dtype=torch.float16)
    sentence(str(caught.value), "use bfloat16 or float32 (float16 overflows")
    for arguments in (["inspect", str(TINY_MINIFLUX)], ["render", *rendering(table, TINY_MINIFLUX)]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*arguments, "--dtype", "float16"])
        assert stopped.value.code == 2
        sentence(capsys.readouterr().err, "dtype 'float16': Input should be ")


@pytest.fixture(scope="module")
def pipe() -> PyramidFlowPipeline:
    return PyramidFlowPipeline.from_pretrained("toy", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def encode() -> Encode:
    return Encode(ModelConfig("toy", None, "cpu", "float32", threads=1), "/nonexistent", frozenset())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", "", "is empty"),
        ("prompt", 5, "prompt 5"),
        ("prompt", None, "prompt None"),
        ("negative_prompt", 5, "negative_prompt "),
        ("height", 100, "height 100 is not a multiple of 64: the nearest are 64 and 128"),
        ("width", "wide", "width 'wide'"),
        ("num_frames", 120, "num_frames 120 is not 1 + 8k: the nearest are 113 and 121"),
        ("num_frames", 9.5, "num_frames 9.5"),
        ("num_inference_steps", [1, 1], "is neither one"),
        ("num_inference_steps", 2.5, "num_inference_steps 2.5"),
        ("guidance_scale", "strong", "guidance_scale 'strong'"),
        ("seed", -1, "seed -1"),
        ("seed", 1.5, "seed 1.5"),
        ("image", png()[:-2000], "does not decode"),
        ("image_fit", "stretch", "image_fit "),
    ],
)
def test_a_bad_value_is_one_sentence_from_the_pipeline_and_in_its_row(pipe, encode, field, value, words):
    values = {"prompt": "a", **SHORT, field: value} | ({"image": png()} if field == "image_fit" else {})
    [done] = encode(batch(item(pipe.preset, **values))).items
    assert done.row.error is not None
    sentence(done.row.error.message, words)
    called = {name: Image.open(io.BytesIO(each)) if name == "image" else each for name, each in values.items()}
    with pytest.raises(PyramidFlowError) as caught:
        pipe(**called)
    sentence(str(caught.value), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": "cat.png"}, "image of type str is not a PIL.Image.Image"),
        ({"seed": None}, "seed None is neither a whole number nor one per prompt"),
        ({"seed": ["1"]}, "seed '1' is not a whole number"),
        ({"on_step": lambda info: True}, "on_step's answer True is neither None nor a mask"),
        ({"prompt": ["a", 5]}, "prompt ['a', 5] is not text"),
    ],
)
def test_what_only_python_can_get_wrong_is_one_sentence(pipe, options, words):
    with pytest.raises(PyramidFlowError) as caught:
        pipe(**{"prompt": "a", **SHORT, **options})
    sentence(str(caught.value), words)
