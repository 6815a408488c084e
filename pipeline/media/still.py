"""A frame to a PNG or WebP that says how it was made."""

import io
import re
from collections.abc import Mapping
from xml.etree import ElementTree

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.media.video import Frames, tag_value
from pipeline.request import ImageFormat

XMP = "urn:pyramid-render:tags"
"""Namespace of the tags in a WebP's XMP packet."""

WEBP_QUALITY = 95

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def encode_still(frame: Frames, image_format: ImageFormat, tags: Mapping[str, str]) -> bytes:
    """Encode one frame [H,W,3], uint8 RGB, as PNG or as WebP of quality 95; equal input gives equal bytes.

    tags: text chunks of a PNG, an XMP packet of a WebP; their values are cut as those of `VideoWriter` are.
    """
    buffer = io.BytesIO()
    values = {name: tag_value(value) for name, value in tags.items()}
    if image_format == "png":
        Image.fromarray(frame).save(buffer, "PNG", pnginfo=_text_chunks(values))
    else:
        Image.fromarray(frame).save(buffer, "WEBP", quality=WEBP_QUALITY, xmp=_xmp(values))
    return buffer.getvalue()


def _text_chunks(tags: Mapping[str, str]) -> PngInfo:
    info = PngInfo()
    for name, value in tags.items():
        info.add_itxt(name, value)
    return info


def _xmp(tags: Mapping[str, str]) -> bytes:
    """Return the tags as properties of an RDF description; what XML has no way to say becomes U+FFFD."""
    root = ElementTree.Element("{adobe:ns:meta/}xmpmeta")
    properties = {f"{{{XMP}}}{name}": _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", value) for name, value in tags.items()}
    about = {f"{{{_RDF}}}about": ""}
    ElementTree.SubElement(ElementTree.SubElement(root, f"{{{_RDF}}}RDF"), f"{{{_RDF}}}Description", about | properties)
    return ElementTree.tostring(root)
