"""A checkpoint folder in the published layout: which parts it has, loading them strictly, and writing one."""

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pyramid_flow.checkpoints.adapters import Adapter, apply_adapter, merge_adapters
from pyramid_flow.checkpoints.fingerprint import fingerprint
from pyramid_flow.checkpoints.layout import (
    CONFIG_FILE,
    PRESET_FILE,
    TEXT_LAYOUTS,
    TRANSFORMER_PREFIX,
    VAE_FOLDER,
    TextLayout,
)
from pyramid_flow.checkpoints.published import REPOSITORIES, fetched_folder
from pyramid_flow.checkpoints.weight_files import read_json, stored_tensors
from pyramid_flow.errors import CheckpointError, InvalidValueError
from pyramid_flow.presets import PRESETS, Preset
from pyramid_flow.text.folders import check_encoder, check_tokenizer
from pyramid_flow.transformer.flux import FluxNetwork
from pyramid_flow.transformer.mmdit import MMDiTNetwork
from pyramid_flow.transformer.model import PyramidTransformer
from pyramid_flow.vae.model import VAENetwork

if TYPE_CHECKING:
    from pyramid_flow.checkpoints.diffusers_models import CausalVideoVAE, TransformerModel
    from pyramid_flow.text.encoder import TextEncoder

BUNDLED = {"toy": Path(__file__).resolve().parents[1] / "toy" / "weights"}
"""Checkpoints that come with the package, by the name that stands for their path."""

NETWORKS: dict[str, type[PyramidTransformer]] = {"miniflux": FluxNetwork, "sd3": MMDiTNetwork}
"""Of the transformers, by family."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Network = TypeVar("Network", bound=PyramidTransformer | VAENetwork)


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype the model can run in; float16 raises InvalidValueError."""
    if dtype not in DTYPES.values():
        raise InvalidValueError(
            "torch_dtype", dtype, "is not supported: use bfloat16 or float32 (float16 overflows in these transformers)"
        )
    return dtype


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and the transformer chosen from it; `open` one rather than construct it."""

    root: Path
    transformer_folder: Path
    adapters: tuple[Adapter, ...] = ()

    @classmethod
    def open(cls, path: str | Path, variant: str | None = None, lora: str | Sequence[str] = ()) -> "Checkpoint":
        """Find the transformer of a checkpoint; raises CheckpointError for a missing folder or an unclear variant.

        path: a folder in the published layout, or a name: "toy" for the bundled model, "miniflux" or "sd3" for what was
        fetched (a folder of that name is "./toy").
        variant: "384p", "768p", "image" or a folder name; None = the only transformer folder there is. lora: adapters
        of the transformer, each PATH or PATH=WEIGHT (1 if not given).
        """
        root = find_root(path)
        names = list_variants(path)
        if variant is None and len(names) > 1:
            raise CheckpointError(f"{root} has several variants, choose one of: {', '.join(names)}")
        for name in names:
            folder = root / f"{TRANSFORMER_PREFIX}{name}"
            if variant in (None, name, folder.name):
                return cls(root, folder, tuple(map(Adapter.parse, [lora] if isinstance(lora, str) else lora)))
        raise CheckpointError(f"{root} has no variant {variant!r}, it has: {', '.join(names)}")

    @property
    def variant(self) -> str:
        """Name of the chosen transformer, such as "384p"."""
        return self.transformer_folder.name.removeprefix(TRANSFORMER_PREFIX)

    @property
    def path(self) -> str:
        """What `open` finds it by, on every machine that has it: "toy", or the folder."""
        bundled = {folder: name for name, folder in BUNDLED.items()}
        return bundled.get(self.root, str(self.root))

    @property
    def name(self) -> str:
        """What people call it: "toy", or folder and variant, and adapters: "pyramid-flow-miniflux/384p + style=0.8"."""
        return " + ".join((self._base_name, *map(str, self.adapters)))

    @property
    def lora(self) -> tuple[str, ...]:
        """The adapters, as `open` takes them, on every machine that has them."""
        return tuple(f"{adapter.path}={adapter.weight!r}" for adapter in self.adapters)

    @property
    def _base_name(self) -> str:
        if self.path in BUNDLED:
            return self.path
        in_cache = self.root.parent.name == "snapshots"  # of the Hub: models--OWNER--NAME/snapshots/COMMIT
        folder = self.root.parents[1].name.rpartition("--")[2] if in_cache else self.root.name
        return f"{folder}/{self.variant}"

    @cached_property
    def family(self) -> str:
        """What the transformer's class says: "miniflux" or "sd3"; raises CheckpointError for another one."""
        name = _read_config(self.transformer_folder).get("_class_name")
        known = {network.class_name: family for family, network in NETWORKS.items()}
        if name not in known:
            raise CheckpointError(f"{self.transformer_folder} holds a {name}, not a {' or '.join(known)}")
        return known[name]

    @property
    def num_attention_heads(self) -> int:
        """Of the transformer; what several devices can share it by."""
        return self.empty_transformer().num_attention_heads

    @property
    def text_layout(self) -> TextLayout:
        """Where the text encoders lie."""
        return TEXT_LAYOUTS[self.family]

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of all models in use."""
        return (self.transformer_folder, *(self.root / name for name in (VAE_FOLDER, *self.text_layout.encoders)))

    @cached_property
    def preset(self) -> Preset:
        """The preset of family and variant, updated with the checkpoint's own pyramid.json."""
        presets = PRESETS[self.family]
        preset = presets.get(self.variant, presets["384p"])
        path = self.root / PRESET_FILE
        return preset.updated(read_json(path)) if path.exists() else preset

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash over pyramid.json, adapters and all tensors in use; see `fingerprint.fingerprint`."""
        settings = self.root / PRESET_FILE
        beside = "".join(adapter.digest for adapter in self.adapters)
        return fingerprint(self.folders, (settings.read_bytes() if settings.exists() else b"") + beside.encode())

    def empty_transformer(self) -> PyramidTransformer:
        """Return the transformer that the config describes, on the meta device."""
        return _empty(NETWORKS[self.family], self.transformer_folder)

    def empty_vae(self) -> VAENetwork:
        """Return the VAE that the config describes, on the meta device."""
        return _empty(VAENetwork, self.root / VAE_FOLDER)

    def load_transformer(self, dtype: torch.dtype, device: torch.device | str) -> "TransformerModel":
        """Load the transformer with its adapters, strictly; raises CheckpointError naming what does not fit."""
        from pyramid_flow.checkpoints.diffusers_models import TRANSFORMERS  # here, because diffusers is slow to import

        transformer = load_model(TRANSFORMERS[self.family], self.transformer_folder, dtype, device)
        return merge_adapters(transformer, self.adapters)

    def load_vae(self, dtype: torch.dtype, device: torch.device | str) -> "CausalVideoVAE":
        """Load the VAE strictly."""
        from pyramid_flow.checkpoints.diffusers_models import (
            CausalVideoVAE,  # here, because diffusers is slow to import
        )

        vae: CausalVideoVAE = load_model(CausalVideoVAE, self.root / VAE_FOLDER, dtype, device)
        return vae

    def load_text_encoder(self, dtype: torch.dtype, device: torch.device | str) -> "TextEncoder":
        """Load the text encoders and their tokenizers strictly."""
        from pyramid_flow.text.encoder import TextEncoder  # here, because transformers is slow to import

        return TextEncoder.from_pretrained(self.root, self.text_layout, check_dtype(dtype)).to(device)

    def check(self) -> None:
        """Compare transformer, VAE and adapters with their configs, and see that the text folders can be read.

        Loads no weights; raises CheckpointError.
        """
        check_tensors(NETWORKS[self.family], self.transformer_folder)
        check_tensors(VAENetwork, self.root / VAE_FOLDER)
        layout = self.text_layout
        for name in (*layout.encoders, *layout.tokenizers):
            if not (self.root / name).is_dir():
                raise CheckpointError(f"{self.root} has no folder {name}")
        for name in layout.encoders:
            check_encoder(self.root / name)
        for name in layout.tokenizers:
            check_tokenizer(self.root / name)
        for adapter in self.adapters:
            apply_adapter(self.empty_transformer(), adapter)


def save_checkpoint(
    folder: Path,
    variant: str,
    transformer: "TransformerModel",
    vae: "CausalVideoVAE",
    text_encoder: "TextEncoder",
    preset: Preset,
) -> None:
    """Write a checkpoint in the published layout, weights in safetensors and the preset in pyramid.json.

    The folder must be new or empty, or hold a checkpoint of this family with this variant alone, none of whose parts is
    a link; they are replaced once all are written, files of other names stay. Else raises CheckpointError.
    """
    family = next(name for name, cls in NETWORKS.items() if isinstance(transformer, cls))
    folder = folder.expanduser().resolve()
    _check_replaceable(folder, family, variant)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as name:
        made, old = Path(name, "new"), Path(name, "old")
        made.mkdir()
        old.mkdir()
        transformer.save_pretrained(made / f"{TRANSFORMER_PREFIX}{variant}")
        vae.save_pretrained(made / VAE_FOLDER)
        text_encoder.save_pretrained(made, TEXT_LAYOUTS[family])
        write_preset(made, asdict(preset))
        for part in made.iterdir():
            if (folder / part.name).exists():
                (folder / part.name).replace(old / part.name)
            part.replace(folder / part.name)


def write_preset(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a checkpoint's own values of `Preset`, which win over the built-in ones."""
    (folder / PRESET_FILE).write_text(json.dumps(values, indent=2) + "\n")


def _check_replaceable(folder: Path, family: str, variant: str) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        same = list_variants(folder) == [variant] and Checkpoint.open(folder).family == family
    except CheckpointError:
        same = False
    if same and any(part.is_symlink() for part in folder.iterdir()):
        raise CheckpointError(f"{folder} holds links, which are not written over")
    if not same:
        raise CheckpointError(f"{folder} is neither empty nor a {family} checkpoint with the variant {variant} alone")


def list_variants(path: str | Path) -> list[str]:
    """Return the names of the transformers of a checkpoint; raises CheckpointError if there is none."""
    root = find_root(path)
    if not root.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {root} (`pyramid-render fetch` downloads published ones)")
    folders = sorted(folder for folder in root.glob(TRANSFORMER_PREFIX + "*") if folder.is_dir())
    if not folders:
        raise CheckpointError(f"{root} has no folder {TRANSFORMER_PREFIX}*, as published checkpoints have")
    return [folder.name.removeprefix(TRANSFORMER_PREFIX) for folder in folders]


def find_root(path: str | Path) -> Path:
    """Return the absolute folder that a path or a name stands for; raises CheckpointError for a name not fetched."""
    if str(path) in REPOSITORIES:
        return fetched_folder(str(path)).resolve()
    return BUNDLED.get(str(path), Path(path)).expanduser().resolve()


def load_model(cls: type[Network], folder: Path, dtype: torch.dtype, device: torch.device | str) -> Network:
    """Load a model of diffusers whose tensors match its config exactly, ready for inference."""
    check_tensors(cls, folder)
    model: Any = cls.from_pretrained(  # type: ignore[attr-defined]
        folder, torch_dtype=check_dtype(dtype), local_files_only=True, use_safetensors=True, low_cpu_mem_usage=True
    )
    ready: Network = model.to(device).eval().requires_grad_(False)
    return ready


def check_tensors(cls: type[Network], folder: Path) -> None:
    """Raise CheckpointError unless the folder holds exactly the tensors that its config asks for."""
    expected = {name: tuple(tensor.shape) for name, tensor in _empty(cls, folder).state_dict().items()}
    actual = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    for name in sorted(expected.keys() - actual.keys()):
        raise CheckpointError(f"{folder} lacks the tensor {name} {list(expected[name])}")
    for name in sorted(actual.keys() - expected.keys()):
        raise CheckpointError(f"{folder} holds an unknown tensor {name} {list(actual[name])}")
    for name, shape in expected.items():
        if actual[name] != shape:
            raise CheckpointError(f"{folder}: tensor {name} has shape {list(actual[name])}, expected {list(shape)}")


def _empty(cls: type[Network], folder: Path) -> Network:
    config = _read_config(folder)
    if config.get("_class_name") != cls.class_name:
        raise CheckpointError(f"{folder} holds a {config.get('_class_name')}, not a {cls.class_name}")
    arguments = {name: config[name] for name in inspect.signature(cls).parameters if name in config}
    try:
        with torch.device("meta"):
            network: Any = cls(**arguments)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} describes no {cls.class_name}: {error}") from error
    ready: Network = network.eval()
    return ready


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}")
    return read_json(folder / CONFIG_FILE)
