"""Content credentials: a signed C2PA manifest inside a file, which says that a model made it, which one, and how."""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pyramid_flow.errors import PyramidFlowError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

KEY = "PYRAMID_RENDER_C2PA_KEY"
"""Environment variable with the private key (PEM) of who signs, wherever files are published: a secret has no flag."""

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for what a trained model has made."""

REQUEST = "pyramid-render.request"
"""Label of the assertion that holds the request."""

PLAIN = {"builder": {"thumbnail": {"enabled": False}}}
"""Settings of C2PA's library: its picture of a still would be larger than the still."""

CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


class SigningError(PyramidFlowError):
    """Files cannot be signed."""


@dataclass(frozen=True)
class Signing:
    """What files are signed with.

    certificates: PEM, that of who signs first, then its issuers, and nothing else; facts: what a manifest says beside
    the request, by name: software_version, model, model_fingerprint.
    """

    certificates: str
    facts: Mapping[str, str]

    @classmethod
    def read(cls, path: str, facts: Mapping[str, str]) -> "Signing":
        """Read a file of certificates; raises SigningError if it cannot be read or holds a private key."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SigningError(f"c2pa_certificate cannot be read: {error}") from error
        if "PRIVATE KEY" in text:  # all that stands in it would be published in every file
            raise SigningError(f"{path} holds a private key: leave only certificates in it, the key belongs in {KEY}")
        return cls(text, facts)

    def check(self) -> None:
        """Sign a picture of one pixel; raises SigningError if that cannot be done."""
        if find_spec("c2pa") is None:
            raise SigningError("signing needs C2PA's library: pip install 'pyramid-render[c2pa]'")
        buffer = io.BytesIO()
        Image.new("RGB", (1, 1)).save(buffer, "PNG")
        self.signed(buffer.getvalue(), "image/png", "a try", {})

    def signed(self, data: bytes, media_type: str, title: str, request: Mapping[str, Any]) -> bytes:
        """Return a file with a manifest, whose signature covers all of it; raises SigningError.

        request: what was asked for, as JSON can hold it.
        """
        from c2pa import Builder, C2paError, C2paSignerInfo, Context, Signer

        info = C2paSignerInfo(self._algorithm(), self.certificates.encode(), _private_key(), None)
        manifest, made = json.dumps(self._manifest(title, request)), io.BytesIO()
        try:
            with (
                Signer.from_info(info) as signer,
                Context.from_dict(PLAIN) as context,
                Builder(manifest, context) as builder,
            ):
                builder.sign(signer, media_type, io.BytesIO(data), made)
        except C2paError as error:
            raise SigningError(f"a file cannot be signed: {error}") from error
        return made.getvalue()

    def _algorithm(self) -> str:
        """Return the C2PA name of the algorithm that goes with the certificate's key."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
        from cryptography.x509 import load_pem_x509_certificate

        try:
            key: PublicKeyTypes = load_pem_x509_certificate(self.certificates.encode()).public_key()
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SigningError(f"the certificate is not one in PEM: {error}") from error
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in CURVES:
            return CURVES[key.curve.name]
        if isinstance(key, ed25519.Ed25519PublicKey):
            return "ed25519"
        if isinstance(key, rsa.RSAPublicKey):
            return "ps256"
        raise SigningError(f"a certificate's key of the kind {type(key).__name__} signs nothing in C2PA")

    def _manifest(self, title: str, request: Mapping[str, Any]) -> dict[str, Any]:
        software = {"name": "pyramid-render", "version": self.facts["software_version"]}
        created = {"action": "c2pa.created", "digitalSourceType": GENERATED, "softwareAgent": software}
        return {
            "claim_generator_info": [software],
            "title": title,
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
                {"label": REQUEST, "data": {**self.facts, **request}},
            ],
        }


def _private_key() -> bytes:
    key = os.environ.get(KEY, "")
    if not key:
        raise SigningError(f"the private key must be in {KEY}, in the environment of every process that publishes")
    if "BEGIN PRIVATE KEY" not in key:
        raise SigningError(
            f"{KEY} must hold an unencrypted key in PKCS#8, not a path or another format: openssl pkcs8 -topk8 -nocrypt"
        )
    return key.encode("utf-8", "replace")
