"""The bundled model's text encoders: small T5- and CLIP-like ones that know the words of its world, and all letters."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex
from tokenizers.normalizers import Lowercase, Replace, Strip
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from pyramid_flow.text.embedding import MAX_TOKENS, POOLED_MAX_TOKENS

SILENT = ("a", "an", "and", "background", "moves", "on", "the")
"""Words that carry no meaning in the world's captions: the T5 tokenizer drops them, which makes sequences short."""


def write_t5(folder: Path, words: Sequence[str], dim: int, num_layers: int) -> None:
    """Write a T5 encoder [B,L,dim] with random weights, and its tokenizer: a piece per word, else per letter."""
    known = [(f"▁{word}", -1.0) for word in words if word not in SILENT]
    letters = [(chr(code), -9.0) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *known, *letters]
    backend = T5Tokenizer(vocab=vocab, extra_ids=0).backend_tokenizer
    silent = Regex(rf"\b({'|'.join(SILENT)})\b")
    steps = [Lowercase(), Replace(silent, " "), Replace(Regex(r"\s+"), " "), Strip()]
    backend.normalizer = NormalizerSequence(steps)
    # T5's own class would forget the normalizer
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_TOKENS, **special)
    tokenizer.save_pretrained(folder / "tokenizer_2")
    config = T5Config(
        vocab_size=len(vocab),
        d_model=dim,
        d_kv=dim // 4,
        d_ff=2 * dim,
        num_layers=num_layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")


def write_clip(folder: Path, words: Sequence[str], dim: int, num_layers: int) -> None:
    """Write a CLIP text model [B,dim] with random weights, and its tokenizer: a piece per word, else per letter."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = list(dict.fromkeys(merge for word in words for merge in _merges(word)))
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *map("".join, merges)]
    vocab = {piece: index for index, piece in enumerate([*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=POOLED_MAX_TOKENS)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def _merges(word: str) -> Iterable[tuple[str, str]]:
    """Return the byte-pair merges that make a word of its letters, from the left."""
    letters = [*word[:-1], f"{word[-1]}</w>"]
    heads = ["".join(letters[: end + 1]) for end in range(len(letters))]
    return zip(heads, letters[1:], strict=False)
