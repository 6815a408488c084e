"""Texts without their secrets: error messages, and URIs as records keep them."""

import re

MAX_MESSAGE = 500
"""Characters of an error message in the ledger, in logs and in what a user of the service sees."""

# Errors quote text that anyone may have written, so each pattern is linear: no part of a text is scanned twice.
_URL = re.compile(r"://[^\s\"'<>]+")
_SECRETS = [
    (re.compile(r"(://)[^\s/:@\"']*:[^\s/\"']*@"), r"\1***@"),
    (re.compile(r"(https?://)[^\s/@\"']+@"), r"\1***@"),
    (re.compile(r"\bA(?:KIA|SIA)[A-Z0-9]{12,}"), "***"),
    (re.compile(r"\bpr-[\w-]{20,}"), "***"),  # keys of our own service
    (
        re.compile(
            r"(?i)(?<![\w-])(?=sig(?![\w-])|[\w-]*?"
            r"(?:signature|token|secret|password|credential|authorization|cookie|access_?key|api_?key|accountkey))"
            r"([\w-]++(?:\\*+[\"'])?\s*+[=:]\s*+(?:\\*+[\"'])?(?:bearer |basic )?)"
            r"(?:(?<=[\"'])[^\"']*|[^\s&\"',;]+)"
        ),
        r"\1***",
    ),
]


def redacted(text: str) -> str:
    """Return a text without the secrets in it: queries and passwords of URLs, access keys, tokens."""
    text = _URL.sub(_without_query, text)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def brief(text: str) -> str:
    """Return an error message without secrets, cut to `MAX_MESSAGE` characters."""
    text = redacted(text[: 8 * MAX_MESSAGE])
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."


def recorded(uri: str) -> str:
    """Return a URI, whole or relative to a web root, as records may keep it: a signed one opens its bucket to readers.

    A "?" in the name of a file is kept.
    """
    path, _, query = uri.partition("?")
    return redacted(f"{path}?***" if "=" in query else uri)


def _without_query(url: re.Match[str]) -> str:
    path, _, query = url[0].partition("?")
    return f"{path}?***" if query else url[0]
