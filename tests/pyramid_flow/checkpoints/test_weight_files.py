"""Weight files: what the headers say is what the files hold."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyramid_flow import CheckpointError
from pyramid_flow.checkpoints.weight_files import STORED_DTYPES, stored_tensors
from tests.pyramid_flow.goldens import TINY_MINIFLUX


def test_every_tensor_lies_where_its_header_says():
    folder = TINY_MINIFLUX / "causal_video_vae"
    file = folder / "diffusion_pytorch_model.safetensors"
    data, stored = file.read_bytes(), stored_tensors(folder)
    for name, tensor in load_file(file).items():
        entry = stored[name]
        assert (entry.file, entry.dtype, entry.shape) == (file, tensor.dtype, tuple(tensor.shape))
        assert entry.num_elements == tensor.numel()
        assert data[entry.start : entry.stop] == tensor.numpy().tobytes()


@pytest.mark.parametrize("dtype", STORED_DTYPES.values())
def test_types_are_read_as_they_were_written(tmp_path, dtype):
    save_file({"t": torch.zeros(2, 3).to(dtype), "scalar": torch.zeros(()).to(dtype)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert (stored["t"].num_elements, stored["scalar"].num_elements) == (6, 1)


def test_a_type_that_is_not_known_is_named(tmp_path: Path):
    header = json.dumps({"t": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor t is U16, not one of BOOL, U8"):
        stored_tensors(tmp_path)
