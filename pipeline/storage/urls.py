"""URLs as text: which are on the web, the one form of a host's name, and what messages may show."""

import re
from ipaddress import ip_address
from urllib.parse import unquote

from yarl import URL

from pipeline.request import RequestError

MAX_DECODINGS = 4

_SCHEMES = ("http", "https")
_URI = re.compile(r"(?:[\w.~:/?#\[\]@!$&'()*+,;=-]|%[0-9a-f]{2})*", re.ASCII | re.IGNORECASE)
_HOST = re.compile(r"[\w-]{1,63}(?:\.[\w-]{1,63})*", re.ASCII)
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")


def is_web(uri: str) -> bool:
    """Tell whether a URI is an http or https URL."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme.lower() in _SCHEMES


def web_url(reference: str, base: URL | None = None) -> URL:
    """Return an http(s) URL, joined to a base if there is one, with its host in the form of `host_name`.

    What is a proper URI already keeps its characters, as signatures are made over them. Raises RequestError for a text
    that is no such URL, and for one that carries a user or password.
    """
    try:
        url = URL(reference, encoded=bool(_URI.fullmatch(reference)))
        url = url if base is None else base.join(url)
        host, _ = url.raw_host or "", url.port  # they are looked for only now
    except ValueError as error:
        raise RequestError("it is no valid URL") from error
    if url.scheme not in _SCHEMES:
        raise RequestError(f"it leads to a URL of scheme {url.scheme!r}, neither http nor https")
    if "@" in url.raw_authority:
        raise RequestError("its URL carries a user or password")
    return url.with_host(host_name(host))


def host_name(text: str) -> str:
    """Return a host as hosts are compared: lower case, IDNA, no last dot; an IP address without brackets.

    Raises RequestError for what is no host: a pattern, a URL, a host with a port, an IPv4 address in an unusual form.
    """
    try:
        built = URL.build(scheme="http", host=text.strip("[]").lower())
        host = (built.raw_host or "").removesuffix(".")
        if is_address(host):
            return str(ip_address(host))
    except ValueError as error:
        raise RequestError(f"{text!r} is no host") from error
    if not _HOST.fullmatch(host):
        raise RequestError(f"{text!r} is no host")
    return host


def is_address(host: str) -> bool:
    """Return whether a host is an IP address: it has a colon, or ends in a number in any of the known forms."""
    return ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]) is not None


def climbs(path: str) -> bool:
    """Tell whether a path has a ".." part, however often it was percent-encoded, or more often than makes sense."""
    for _ in range(MAX_DECODINGS):
        encoded, path = path, unquote(path)
        if path == encoded:
            return ".." in re.split(r"[/\\]", path)
    return True


def shown(uri: str) -> str:
    """Return a URI as messages may show it: without user, password, query and fragment."""
    return re.sub(r"(?s)([?#]).+", r"\1***", re.sub(r"//[^/?#]*@", "//***@", uri))
