"""Links to a video's files that work without a key, for a while: a browser loads media from them."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field

VALID_S = 600
EVERY_S = 60
"""Links are made anew as often only, so that a browser that asks for them again finds the files in its cache."""


def _secret() -> bytes:
    return secrets.token_bytes(32)


@dataclass(frozen=True)
class Links:
    """Signs links, and knows its own; all replicas of the interface share the secret, which is written nowhere."""

    secret: bytes = field(default_factory=_secret, repr=False)

    def signed(self, path: str, variant: str | None, now: float) -> str:
        """Return the relative URL of a file, good for `VALID_S` seconds and at most `EVERY_S` more."""
        expires = (int(now + VALID_S) // EVERY_S + 1) * EVERY_S
        query = f"expires={expires}&signature={self._signature(path, variant, expires)}"
        return f"{path}?variant={variant}&{query}" if variant else f"{path}?{query}"

    def is_good(self, path: str, variant: str | None, expires: int, signature: str, now: float) -> bool:
        """Say whether a link was signed here, for this file, and is not over."""
        is_own = hmac.compare_digest(signature.encode(), self._signature(path, variant, expires).encode())
        return is_own and now < expires

    def _signature(self, path: str, variant: str | None, expires: int) -> str:
        message = f"{path}\n{variant or ''}\n{expires}".encode()
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()
