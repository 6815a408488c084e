"""What an image-text model tells of a video: whether it shows what the prompt says, and whether it looks good."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from pipeline.media.video import Frames, check_frames, evenly_spaced
from pyramid_flow.errors import CheckpointError, NonFiniteError, PyramidFlowError
from pyramid_flow.text.folders import check_encoder, check_tokenizer

NUM_FRAMES = 8
FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")
GOOD, BAD = "Good photo.", "Bad photo."


class ImageTextError(PyramidFlowError):
    """A folder holds no image-text model."""


def check_model(path: str) -> None:
    """Raise ImageTextError for a folder that holds no CLIP model."""
    missing = [name for name in FILES if not (Path(path) / name).is_file()]
    if missing:
        raise ImageTextError(f"image_text_model {path} has no {missing[0]}; a CLIP model has {', '.join(FILES)}")
    try:
        kind = json.loads((Path(path) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ImageTextError(f"image_text_model {path}: config.json cannot be read: {error}") from error
    if kind != "clip":
        raise ImageTextError(f"image_text_model {path} is of type {kind!r}, not clip")
    try:
        check_encoder(Path(path))
        check_tokenizer(Path(path))
    except CheckpointError as error:
        raise ImageTextError(f"image_text_model {error}") from error


@dataclass
class PickedFrames:
    """Keeps evenly spaced frames, first and last among them, while chunks stream by: uint8 [H,W,3] each."""

    num_frames: int
    frames: list[Frames] = field(default_factory=list)
    _num_seen: int = 0

    def add(self, frames: Frames) -> None:
        """Take the next chunk: uint8 RGB, [n, height, width, 3]."""
        check_frames(frames)
        wanted = evenly_spaced(self.num_frames, NUM_FRAMES)
        self.frames += [frame.copy() for number, frame in enumerate(frames, self._num_seen) if number in wanted]
        self._num_seen += len(frames)


class ImageTextModel:
    """A CLIP model (arXiv 2103.00020) in the folder layout of transformers."""

    def __init__(self, path: str, device: torch.device | str, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel  # here: it warns of a lack of torchvision

        check_model(path)
        model = CLIPModel.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype
        )
        self.model = nn.Module.to(model, device).eval()
        self.pictures = CLIPImageProcessor.from_pretrained(path, local_files_only=True)
        self.words = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)

    @torch.no_grad()
    def scores(self, prompt: str, frames: list[Frames]) -> dict[str, float]:
        """Return text_similarity and aesthetics of frames, uint8 [H,W,3] each, averaged over them.

        text_similarity: cosine of the embeddings of frame and prompt, -1 to 1 (CLIPScore, arXiv 2104.08718, without its
        factor; a prompt is cut to the model's length). aesthetics: the probability that a frame is "Good photo."
        rather than "Bad photo.", 0 to 1 (CLIP-IQA, arXiv 2207.12396). Raises NonFiniteError.
        """
        length = self.model.config.text_config.max_position_embeddings
        words = self.words([prompt, GOOD, BAD], padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self.pictures(images=frames, return_tensors="pt")["pixel_values"]
        out = self.model(
            input_ids=words["input_ids"].to(self.model.device),
            attention_mask=words["attention_mask"].to(self.model.device),
            pixel_values=pixels.to(self.model.device, self.model.dtype),
        )
        similarity = out.image_embeds.float() @ out.text_embeds.float().T
        if not similarity.isfinite().all():
            raise NonFiniteError("the scores of the image-text model are not finite")
        quality = (self.model.logit_scale.float().exp() * similarity[:, 1:]).softmax(dim=-1)
        return {"text_similarity": float(similarity[:, 0].mean()), "aesthetics": float(quality[:, 0].mean())}
