"""Stills: every pixel of a PNG, nearly those of a WebP, and tags that come back as they were."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipeline.media.still import XMP, encode_still
from pipeline.media.video import MAX_TAG_BYTES
from pyramid_flow.toy.world import Scene

[FRAME] = Scene("red", "circle", "large", "up", "slowly", "dark", start=(0.5, 0.5)).render(num_frames=1, side=64)
TAGS = {"prompt": 'a <fox> & "Füchse" 🦊 ]]>\n\tnext line\r', "seed": "7"}


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def tags_of(image: Image.Image) -> dict[str, str]:
    if image.format == "PNG":
        return {name: str(value) for name, value in image.text.items()}
    [description] = ElementTree.fromstring(image.info["xmp"]).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    return {name.removeprefix(f"{{{XMP}}}"): value for name, value in description.items() if XMP in name}


def test_a_png_holds_every_pixel():
    image = opened(encode_still(FRAME, "png", TAGS))
    assert (image.format, image.mode) == ("PNG", "RGB")
    np.testing.assert_array_equal(np.asarray(image), FRAME)


def test_a_webp_is_close():
    image = opened(encode_still(FRAME, "webp", TAGS))
    assert (image.format, image.size) == ("WEBP", (64, 64))
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - FRAME).mean() < 3


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_tags_of_any_text_come_back(image_format):
    assert tags_of(opened(encode_still(FRAME, image_format, TAGS))) == TAGS


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_tags_that_cannot_be_stored_are_replaced_or_cut(image_format):
    given = {"prompt": "nul \0 half \ud83d", "long": "é" * MAX_TAG_BYTES}
    found = tags_of(opened(encode_still(FRAME, image_format, given)))
    assert found == {"prompt": "nul � half ?", "long": "é" * (MAX_TAG_BYTES // 2)}


def test_what_xml_cannot_say_is_replaced():
    found = tags_of(opened(encode_still(FRAME, "webp", {"prompt": "bell \a, no character \uffff, last \U0010ffff"})))
    assert found == {"prompt": "bell �, no character �, last \U0010ffff"}


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_equal_stills_have_equal_bytes(image_format):
    assert encode_still(FRAME, image_format, TAGS) == encode_still(FRAME.copy(), image_format, dict(TAGS))
    assert encode_still(FRAME, image_format, TAGS) != encode_still(FRAME, image_format, {"seed": "8"})
