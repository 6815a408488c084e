"""Certificates to sign with, and what C2PA's own reader says of a file that was signed."""

import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import c2pa
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import (
    AuthorityKeyIdentifier,
    BasicConstraints,
    Certificate,
    CertificateBuilder,
    ExtendedKeyUsage,
    KeyUsage,
    Name,
    NameAttribute,
    SubjectKeyIdentifier,
    random_serial_number,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KEYS = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
}


@dataclass(frozen=True)
class Identity:
    """Who signs, as PEM: the certificate with its issuer's, and the private key."""

    certificates: str
    key: str


def identity(kind: str = "P-256") -> Identity:
    """Make one; kind: of the key."""
    root_key, key = KEYS["P-256"](), KEYS[kind]()
    root = _certificate("Root", root_key, "Root", root_key)
    own = _certificate("Signer", key, "Root", root_key)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return Identity("".join(each.public_bytes(Encoding.PEM).decode() for each in (own, root)), private)


def manifest_of(data, media_type):
    """Return the manifest, and the codes of what its reader objects to."""
    with c2pa.Reader(media_type, io.BytesIO(data)) as reader:
        shown = json.loads(reader.json())
    objections = {each["code"] for each in shown.get("validation_status", [])}
    return shown["manifests"][shown["active_manifest"]], objections


def _certificate(name: str, key, issuer: str, issuer_key) -> Certificate:
    is_root, now = name == issuer, datetime.now(UTC)
    usage = dict.fromkeys(
        [
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ],
        False,
    )
    builder = (
        CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named(issuer))
        .public_key(key.public_key())
        .serial_number(random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=9))
        .add_extension(BasicConstraints(is_root, None), critical=True)
        .add_extension(KeyUsage(digital_signature=not is_root, key_cert_sign=is_root, crl_sign=is_root, **usage), True)
        .add_extension(SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not is_root:
        builder = builder.add_extension(ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _named(name: str) -> Name:
    return Name([NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"), NameAttribute(NameOID.COMMON_NAME, name)])
