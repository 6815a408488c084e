"""The untrained model is a whole checkpoint of the published layout, and packing halves it."""

import json

import torch

from pyramid_flow import Checkpoint
from pyramid_flow.toy.blank import write_blank_toy
from pyramid_flow.toy.pack import pack
from pyramid_flow.toy.world import held_out_captions


def test_it_is_a_whole_checkpoint_and_repeats(tmp_path):
    for name in ("first", "second"):
        write_blank_toy(tmp_path / name)
        Checkpoint.open(tmp_path / name).check()
    first, second = (Checkpoint.open(tmp_path / name) for name in ("first", "second"))
    assert first.fingerprint == second.fingerprint
    assert first.preset.sizes == ((64, 64),)


def test_its_text_encoder_knows_every_word_and_tells_captions_apart(tmp_path):
    write_blank_toy(tmp_path)
    encoder = Checkpoint.open(tmp_path).load_text_encoder(torch.float32, "cpu")
    caption = "a large red circle moves slowly up and left on a dark background"
    assert encoder.t5_tokenizer.tokenize(caption) == [
        f"▁{word}" for word in ("large", "red", "circle", "slowly", "up", "left", "dark")
    ]
    [clip_tokenizer] = encoder.clip_tokenizers
    assert len(clip_tokenizer.tokenize(caption)) == len(caption.split())
    assert "<unk>" not in encoder.t5_tokenizer.tokenize("A dragon, flying!")
    captions = list(held_out_captions())[::40]
    pooled = encoder(captions).pooled
    assert len(torch.unique(pooled, dim=0)) == len(captions)


def test_packing_keeps_the_model_in_half_the_bytes(tmp_path):
    write_blank_toy(tmp_path / "blank")
    config = tmp_path / "blank" / "causal_video_vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "/home/someone/model"}))
    size = pack(tmp_path / "blank", tmp_path / "packed")
    assert "someone" not in (tmp_path / "packed" / "causal_video_vae" / "config.json").read_text()
    assert size < 25e6
    before, after = (Checkpoint.open(tmp_path / name).load_vae(torch.float32, "cpu") for name in ("blank", "packed"))
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0.01, atol=1e-6)
