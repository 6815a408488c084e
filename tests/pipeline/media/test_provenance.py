"""Signed manifests, read back by C2PA's own reader."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.media.provenance import GENERATED, KEY, REQUEST, Signing, SigningError
from pipeline.media.still import encode_still
from tests.pipeline.certificates import KEYS, identity, manifest_of
from tests.pipeline.mp4 import black_video, probe, read_tags

FACTS = {"model": "toy", "model_fingerprint": "0123", "software_version": "1.2"}
ASKED = {"prompt": "a red ball", "seed": 5, "guidance_scale": 7.0}


@pytest.fixture
def signing(monkeypatch):
    own = identity()
    monkeypatch.setenv(KEY, own.key)
    return Signing(own.certificates, FACTS)


def a_still(image_format):
    return encode_still(np.zeros((64, 64, 3), np.uint8), image_format, {"prompt": "a red ball"})


@pytest.mark.parametrize("media_type", ["video/mp4", "image/png", "image/webp"])
def test_a_file_says_that_a_model_made_it_and_how(signing, tmp_path, media_type):
    data = black_video(tmp_path) if media_type == "video/mp4" else a_still(media_type.partition("/")[2])
    manifest, objections = manifest_of(signing.signed(data, media_type, "ball-0", ASKED), media_type)
    assert objections == {"signingCredential.untrusted"}  # nobody knows the tests' authority
    assert manifest["title"] == "ball-0"
    assert manifest["signature_info"]["common_name"] == "Signer"
    assertions = {each["label"]: each["data"] for each in manifest["assertions"]}
    [action] = assertions["c2pa.actions.v2"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", GENERATED)
    assert action["softwareAgent"] == {"name": "pyramid-render", "version": "1.2"}
    assert assertions[REQUEST] == FACTS | ASKED


def test_a_signed_video_still_plays_with_its_tags(signing, tmp_path):
    path = tmp_path / "signed.mp4"
    path.write_bytes(signing.signed(black_video(tmp_path), "video/mp4", "a", ASKED))
    assert (probe(path).frames, read_tags(path)["prompt"]) == (9, "a red ball")
    picture = Image.open(io.BytesIO(signing.signed(a_still("png"), "image/png", "a", ASKED)))
    assert (picture.size, picture.text["prompt"]) == ((64, 64), "a red ball")


def test_a_change_after_signing_is_seen(signing, tmp_path):
    signed = bytearray(signing.signed(black_video(tmp_path), "video/mp4", "a", ASKED))
    signed[-1] ^= 1
    assert "assertion.bmffHash.mismatch" in manifest_of(bytes(signed), "video/mp4")[1]


@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_key_signs(monkeypatch, kind):
    own = identity(kind)
    monkeypatch.setenv(KEY, own.key)
    signed = Signing(own.certificates, FACTS).signed(a_still("png"), "image/png", "a", ASKED)
    assert manifest_of(signed, "image/png")[1] == {"signingCredential.untrusted"}


def test_without_a_key_it_says_where_one_must_be(signing, monkeypatch):
    monkeypatch.delenv(KEY)
    with pytest.raises(SigningError, match=f"must be in {KEY}"):
        signing.check()


@pytest.mark.parametrize("order", [1, -1])
def test_a_private_key_among_the_certificates_is_refused_and_not_told(signing, tmp_path, order):
    own, path = identity(), tmp_path / "all.pem"
    path.write_text("".join([own.certificates, own.key][::order]))
    with pytest.raises(SigningError, match="holds a private key") as refusal:
        Signing.read(str(path), FACTS)
    assert own.key.splitlines()[1] not in str(refusal.value)


@pytest.mark.parametrize("text", ["/etc/signer.key", "-----BEGIN EC PRIVATE KEY-----\nAAAA", "\udc80"])
def test_a_key_in_another_form_is_refused_with_what_it_must_be(signing, monkeypatch, text):
    monkeypatch.setenv(KEY, text)
    with pytest.raises(SigningError, match="must hold an unencrypted key in PKCS#8"):
        signing.check()


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_a_manifest_is_small(signing, image_format):
    frame = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    still = encode_still(frame, image_format, {})
    assert len(signing.signed(still, f"image/{image_format}", "a", ASKED)) - len(still) < 6000


def test_another_ones_key_is_refused(signing, monkeypatch):
    monkeypatch.setenv(KEY, identity().key)
    with pytest.raises(SigningError, match="cannot be signed"):
        signing.check()


@pytest.mark.parametrize(
    "text", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_is_refused(signing, text):
    with pytest.raises(SigningError, match="the certificate is not one in PEM"):
        replace(signing, certificates=text).check()
