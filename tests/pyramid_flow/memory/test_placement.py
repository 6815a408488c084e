"""Memory modes: the same results in each, and weights on the device no longer than the mode says.

There is one device here. So moving a weight is made to copy it, and the copies that are alive are counted; with
accelerate's hooks a weight rests on the meta device, and those that do not are counted.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import finalize

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from pyramid_flow import Checkpoint, InvalidValueError, PyramidFlowPipeline
from pyramid_flow.memory.modes import MODES
from pyramid_flow.memory.placement import Placement, execution_device
from tests.pyramid_flow.goldens import TINY

CPU, META = torch.device("cpu"), torch.device("meta")
MODELS = {"toy": "toy"} | TINY
QUICK = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1, "video_num_inference_steps": 1}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def loaded(model: object, memory: str) -> PyramidFlowPipeline:
    return PyramidFlowPipeline.from_pretrained(model, torch_dtype=torch.float32, memory=memory)


def parts(pipe: PyramidFlowPipeline) -> list[nn.Module]:
    return [pipe.text_encoder, pipe.vae, pipe.transformer]


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def bytes_on(device: torch.device, module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors(module) if tensor.device == device)


@pytest.mark.parametrize("model", [pytest.param("toy", marks=pytest.mark.integration), *TINY])
def test_every_mode_gives_the_same_latents_and_frames(model):
    results = []
    for mode in MODES:
        pipe = loaded(MODELS[model], mode)
        latents = pipe("a red ball", seed=1, output_type="latent", **QUICK).frames
        moved = pipe("it moves", image=PICTURE, seed=2, output_type="latent", **QUICK).frames
        results.append(
            (latents, moved, *(torch.from_numpy(pipe._frames(each, "np", None)) for each in (latents, moved)))
        )
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            assert (actual.float() - expected.float()).abs().max() <= 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_every_part_says_where_it_computes(model):
    for mode in MODES:
        assert {execution_device(part) for part in parts(loaded(MODELS[model], mode))} == {CPU}
    placement, vae = Placement(META, "sequential"), Checkpoint.open(MODELS[model]).load_vae(torch.float32, "cpu")
    assert placement.place(vae).device == META


def test_full_moves_a_part_for_good():
    vae = Placement(META).place(Checkpoint.open("toy").load_vae(torch.float32, "cpu"))
    assert bytes_on(CPU, vae) == 0


class Copies:
    """Makes `Tensor.to(device)` of a weight a copy, as another device would, and adds up those that are alive."""

    def __init__(self, weights: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, self._own, self._to = 0, {weight.data_ptr() for weight in weights}, Tensor.to
        monkeypatch.setattr(Tensor, "to", lambda tensor, *how, **others: self.moved(tensor, *how, **others))

    def moved(self, tensor: Tensor, *how: object, **others: object) -> Tensor:
        if tensor.data_ptr() not in self._own or how != (CPU,):
            return self._to(tensor, *how, **others)
        copy = tensor.clone()
        self._add(copy.nbytes)
        finalize(copy.untyped_storage(), self._add, -copy.nbytes)
        return copy

    def _add(self, count: int) -> None:
        self.bytes += count


@contextmanager
def at_each_layer(do: Callable[[nn.Module], None]) -> Iterator[None]:
    handle = register_module_forward_pre_hook(lambda module, _: do(module))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("model", MODELS)
def test_offload_has_the_part_on_the_device_that_works_and_no_other(model, monkeypatch):
    pipe = loaded(MODELS[model], "offload")
    owner = {layer: part for part in parts(pipe) for layer in part.modules()}
    weights = [tensor for part in parts(pipe) for tensor in tensors(part)]
    before = [weight.data_ptr() for weight in weights]
    copies, seen = Copies(weights, monkeypatch), defaultdict(set)
    with at_each_layer(lambda layer: seen[owner[layer]].add(copies.bytes)):
        pipe("it moves", image=PICTURE, **QUICK)
    assert seen == {part: {bytes_on(CPU, part)} for part in parts(pipe)}
    assert copies.bytes == 0
    assert [weight.data_ptr() for weight in weights] == before  # nothing was copied back


def test_offload_leaves_the_device_when_the_work_fails(monkeypatch):
    vae = Checkpoint.open("toy").load_vae(torch.float32, "cpu")
    copies = Copies(tensors(vae), monkeypatch)
    there = []

    def work() -> None:
        with Placement(CPU, "offload").working(vae):
            there.append(copies.bytes)
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        work()
    assert there == [bytes_on(CPU, vae)]
    assert copies.bytes == 0


class MostBytes(TorchDispatchMode):
    """Notes the most bytes of weights that are not on the meta device while an operation runs."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.layers, self.bytes = [layer for layer in part.modules() if layer._parameters], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::addmm", "aten::mm", "aten::convolution", "aten::embedding"):
            weights = (weight for layer in self.layers for weight in layer._parameters.values() if weight is not None)
            self.bytes = max(self.bytes, sum(weight.nbytes for weight in weights if weight.device != META))
        return func(*args, **(kwargs or {}))


def test_sequential_has_one_layer_on_the_device():
    pipe = loaded("toy", "sequential")
    assert all(weight.device == META for part in parts(pipe) for weight in part.parameters())
    with ExitStack() as stack:
        most_bytes = {part: stack.enter_context(MostBytes(part)) for part in parts(pipe)}
        pipe("it moves", image=PICTURE, **QUICK)
    for part, most in most_bytes.items():
        largest = max(sum(w.nbytes for w in layer.parameters(recurse=False)) for layer in part.modules())
        assert 0 < most.bytes <= largest
        assert all(weight.device == META for weight in part.parameters())


def test_an_unknown_mode_is_named():
    with pytest.raises(InvalidValueError, match="memory some is not one of auto, full, offload, sequential"):
        loaded("toy", "some")
