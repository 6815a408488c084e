"""Input images by URL: only allowed hosts are asked, and only at public addresses."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from aiohttp import (
    ClientError,
    ClientResponse,
    ClientResponseError,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
)
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_random_exponential,
)
from yarl import URL

from pipeline.request import RequestError
from pipeline.storage.faults import Fault, explained, fault, log_retry, presentable
from pipeline.storage.urls import climbs, host_name, is_address, shown, web_url
from pyramid_flow.errors import PyramidFlowError

MAX_REDIRECTS = 5
READ_BYTES = 2**16


class ImageError(PyramidFlowError):
    """An input image cannot be fetched."""


@dataclass(frozen=True)
class DownloadLimits:
    """How large a file may be, how long fetching it may take, and how often it is tried.

    A try may take `timeout_s`, redirects included, and `connect_timeout_s` for each connection, names looked up
    included; after `timeout_s` in all no further try is begun. Each wait is drawn between half of and all of a length
    that starts at `first_wait_s` and doubles.
    """

    max_bytes: int
    timeout_s: float = 60.0
    connect_timeout_s: float = 10.0
    attempts: int = 3
    first_wait_s: float = 2.0


def is_public_address(address: str) -> bool:
    """Tell whether everyone can reach an IP address, so that it opens no door into our own network."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        carried = _carried(ip)
        if carried is None:
            return ip in _GLOBAL_UNICAST and ip.is_global and ip.scope_id is None
        ip = carried
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _SPECIAL)


_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_SPECIAL = (
    ip_network("192.0.0.0/24"),  # protocol assignments; older Pythons take most of it for global
    ip_network("168.63.129.16/32"),  # a cloud's own services, at an address that looks public
)


def _carried(ip: IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address that packets to an IPv6 address are handed on to."""
    return ip.ipv4_mapped or ip.sixtofour or (IPv4Address(ip.packed[-4:]) if ip in _NAT64 else None)


@dataclass(frozen=True)
class Fetcher:
    """Fetches images from web servers; what a user sends can neither choose another host nor reach our own network.

    Only the hosts in `allowed_hosts` are asked, on any port, directly and not through a proxy, without cookies or
    credentials, and only if all their addresses are public: the addresses that were checked are those that are
    connected to. Redirects obey the same rules and do not lead from https to http.
    """

    allowed_hosts: frozenset[str]
    limits: DownloadLimits
    is_public: Callable[[str], bool] = is_public_address
    resolver: Callable[[], AbstractResolver] = DefaultResolver

    def read(self, uri: str, root: str | None = None) -> bytes:
        """Return an image's bytes; a relative URI is joined to the URL `root`, whose host serves what lies below it.

        Transient faults are tried again. Errors show the URI as `shown` does.

        Raises:
            RequestError: A rule forbids it: the URL, its host or address, a redirect, the size.
            ImageError: The server has no such image.
            StorageError: The server cannot be reached, or fails.
        """
        name = f"image {shown(uri)!r}"
        action = f"fetch {name}"
        retrying = self._retrying(action)
        try:
            url, hosts = self._located(uri, root)
            return retrying(lambda: asyncio.run(self._fetch(url, hosts)))
        except (RequestError, ImageError) as error:
            raise type(error)(f"{name} cannot be fetched: {error}") from None
        except (ClientError, OSError) as error:
            raise explained(action, error, retrying.statistics["attempt_number"]) from presentable(error)

    def _retrying(self, action: str) -> Retrying:
        limits = self.limits
        half_wait_s = limits.first_wait_s / 2
        return Retrying(
            stop=stop_after_attempt(limits.attempts) | stop_after_delay(limits.timeout_s),
            wait=wait_exponential(half_wait_s) + wait_random_exponential(half_wait_s),
            retry=retry_if_exception(lambda error: fault(error) is Fault.TRANSIENT),
            before_sleep=partial(log_retry, action, limits.attempts),
            reraise=True,
        )

    def _located(self, uri: str, root: str | None) -> tuple[URL, frozenset[str]]:
        """Return a URI in full and the hosts that may serve it."""
        if climbs(re.split("[?#]", uri, maxsplit=1)[0]):
            raise RequestError("it lies outside the image root, its path has a '..' part")
        hosts = frozenset(map(host_name, self.allowed_hosts))
        if root is None:
            return web_url(uri), hosts
        base = web_url(root)
        base = base.with_path(f"{base.raw_path.rstrip('/')}/", encoded=True)
        url = web_url(uri, base)
        is_below = url.origin() == base.origin() and url.raw_path.startswith(base.raw_path)
        return url, (hosts | {str(base.raw_host)} if is_below else hosts)

    async def _fetch(self, url: URL, hosts: frozenset[str]) -> bytes:
        try:
            async with asyncio.timeout(self.limits.timeout_s), self._session() as session:
                return await self._follow(session, url, hosts, MAX_REDIRECTS)
        except ClientResponseError:  # its text would show the URL and parts of the answer
            raise ConnectionError("the answer is no valid HTTP") from None

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[ClientSession]:
        resolver = _PublicResolver(self.resolver(), self.is_public)
        session = ClientSession(
            connector=TCPConnector(resolver=resolver, use_dns_cache=False),
            timeout=ClientTimeout(connect=self.limits.connect_timeout_s),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,  # a small answer could become a huge one
            cookie_jar=DummyCookieJar(),
            trust_env=False,  # a proxy would look the host up by itself
        )
        try:
            async with session:
                yield session
        finally:
            await resolver.close()

    async def _follow(self, session: ClientSession, url: URL, hosts: frozenset[str], redirects: int) -> bytes:
        self._check(url, hosts)
        async with session.get(url, allow_redirects=False) as response:
            if response.status not in _REDIRECTS:
                return await _body(response, self.limits.max_bytes)
            target = _redirected(url, response)
        if not redirects:
            raise RequestError(f"it is redirected more than {MAX_REDIRECTS} times")
        return await self._follow(session, target, hosts, redirects - 1)

    def _check(self, url: URL, hosts: frozenset[str]) -> None:
        """Apply the rules to a URL from `web_url`, except to the addresses of a named host: the resolver does that."""
        host = str(url.raw_host)
        if host not in hosts:
            raise RequestError(f"it leads to host {host!r}, which is not allowed; --allow-image-host {host} lifts this")
        if is_address(host) and not self.is_public(host):  # an address is not looked up
            raise RequestError(f"it leads to the address {host}, which is not public")


class _PublicResolver(AbstractResolver):
    """Looks hosts up as another resolver does, and refuses those with an address that is not public."""

    def __init__(self, inner: AbstractResolver, is_public: Callable[[str], bool]) -> None:
        self._inner = inner
        self._is_public = is_public

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        for address in (result["host"] for result in found):
            if not self._is_public(address):
                raise RequestError(f"it leads to host {host!r} at {address}, which is not a public address")
        return found

    async def close(self) -> None:
        await self._inner.close()


_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 429)


def _redirected(url: URL, response: ClientResponse) -> URL:
    target = web_url(response.headers.get("Location", ""), url)
    if url.scheme == "https" and target.scheme == "http":
        raise RequestError("it is redirected from https to http")
    return target


async def _body(response: ClientResponse, max_bytes: int) -> bytes:
    _check_status(response.status)
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise ImageError(f"the server compresses it ({encoding!r}) although asked not to")
    data, announced = bytearray(), response.content_length or 0
    while announced <= max_bytes and (chunk := await response.content.read(READ_BYTES)):
        data += chunk
        announced = max(announced, len(data))
    if announced > max_bytes:
        raise RequestError(f"it is larger than {max_bytes} bytes")
    return bytes(data)


def _check_status(status: int) -> None:
    """Raise what an answer without an image means; the server's own words could hold anything."""
    if status == HTTPStatus.OK:
        return
    known = status in list(HTTPStatus)
    answer = f"{status} {HTTPStatus(status).phrase}" if known else str(status)
    if status in _BUSY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise ConnectionError(answer)
    raise ImageError(answer)
