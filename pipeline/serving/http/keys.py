"""API keys: known by their hashes only, each with the name of who holds it."""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from pyramid_flow.errors import PyramidFlowError

KEY_PREFIX = "pr-"
KEY_BYTES = 32


class KeyFileError(PyramidFlowError):
    """A list of keys is not as it should be."""


@dataclass(frozen=True)
class Keys:
    """Names by the SHA-256 of their keys."""

    names: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "Keys":
        """Read `NAME:SHA256` entries, separated by commas or line ends; "#" starts a comment up to the line's end.

        Raises:
            KeyFileError: An entry has another form.
        """
        names = {}
        for number, line in enumerate(text.splitlines(), start=1):
            for entry in filter(None, map(str.strip, line.partition("#")[0].split(","))):
                name, _, digest = entry.rpartition(":")
                if name.split() != [name] or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                    raise KeyFileError(f"API keys, line {number}: not NAME:SHA256 with 64 hex digits, and no spaces")
                names[digest] = name
        return cls(names)

    def owner(self, key: str) -> str | None:
        """Return who holds a key, or None. What is looked up is a hash, so that its time tells nothing about a key."""
        return self.names.get(hashed(key))


def hashed(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def new_key() -> str:
    """Draw a key."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
