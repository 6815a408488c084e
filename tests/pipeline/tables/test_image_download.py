"""Images by URL: no text that a user can send reaches a host that was not allowed, or an address that is private."""

import datetime
import gzip
import logging
import socket
import ssl
import struct
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.request import RequestError
from pipeline.storage.faults import StorageError, StorageFullError
from pipeline.storage.urls import climbs, host_name, is_web, shown, web_url
from pipeline.tables.image_download import (
    MAX_REDIRECTS,
    DownloadLimits,
    Fetcher,
    ImageError,
    is_public_address,
)

HOST = "images.example"
QUICK = DownloadLimits(max_bytes=1000, timeout_s=30.0, connect_timeout_s=20.0, first_wait_s=0.001)
SECRET = "s3cr3t"


class Server(ThreadingHTTPServer):
    """Answers a path with the function in `routes`, and notes what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes, self.asked, self.headers, self.over = {}, [], [], threading.Event()

    def url(self, path, host=HOST, scheme="http"):
        return f"{scheme}://{host}:{self.server_port}{path}"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is no news


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.headers.append(self.headers)
        self.server.routes.get(self.path.partition("?")[0], answer(404))(self)

    def begin(self, status, headers):
        self.close_connection = True
        self.send_response(status, f"said {SECRET}")
        for name, value in ({"Connection": "close"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format, *arguments):
        pass


class Hosts(AbstractResolver):
    """Looks names up in a table of lists of addresses; of several lists each is used once, the last one for ever."""

    def __init__(self, table):
        self.table, self.lookups = {name: list(turns) for name, turns in table.items()}, []

    def __call__(self):
        return self

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.lookups.append(host)
        turns = self.table.get(host) or []
        if not turns:
            raise OSError(None, "DNS lookup failed")
        addresses = turns.pop(0) if len(turns) > 1 else turns[0]
        return [
            {"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}
            for address in addresses
        ]

    async def close(self):
        pass


def answer(status=200, body=b"image", headers=None):
    """Return a route that answers with a body of known length."""

    def route(handler):
        handler.begin(status, {"Content-Length": str(len(body))} | (headers or {}))
        handler.wfile.write(body)

    return route


def redirect(location, status=302):
    return answer(status, b"", {"Location": location})


def in_turn(*routes):
    """Return a route that behaves as each of several, one after the other."""
    turns = iter(routes)
    return lambda handler: next(turns)(handler)


def endless(chunk=b"x" * 2**16, headers=None, pause_s=0.0):
    """Return a route that sends until the client hangs up or the server closes."""

    def route(handler):
        handler.begin(200, headers or {})
        while not handler.server.over.wait(pause_s):
            handler.wfile.write(chunk)

    return route


def reset(handler):
    """Hang up as hard as a connection can be hung up."""
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def loopback(*hosts, limits=QUICK, is_public=lambda _: True, **table):
    """Return a fetcher for which some host names lie on this machine and everything is public."""
    table = {host: [["127.0.0.1"]] for host in hosts} | table
    return Fetcher(frozenset(table), limits, is_public, Hosts(table))


def strict(host):
    """Return a fetcher with the real address rule and the real resolver."""
    return Fetcher(frozenset({host}), QUICK)


def test_an_image_of_an_allowed_host_is_fetched(server):
    server.routes["/a.png"] = answer(body=b"picture")
    assert loopback(HOST).read(server.url("/a.png")) == b"picture"
    assert server.asked == ["/a.png"]
    assert server.headers[0]["Host"] == f"{HOST}:{server.server_port}"
    assert server.headers[0]["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization", "Referer"} & set(server.headers[0])


def test_empty_chunked_and_unannounced_bodies_are_read_whole(server):
    def chunked(handler):
        handler.begin(200, {"Transfer-Encoding": "chunked"})
        handler.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")

    def unannounced(handler):
        handler.begin(200, {})
        handler.wfile.write(b"abcde")

    server.routes |= {"/empty": answer(body=b""), "/chunked": chunked, "/unannounced": unannounced}
    fetcher = loopback(HOST)
    assert fetcher.read(server.url("/empty")) == b""
    assert fetcher.read(server.url("/chunked")) == fetcher.read(server.url("/unannounced")) == b"abcde"


def test_threads_without_an_event_loop_may_fetch(server):
    server.routes["/a.png"] = answer(body=b"picture")
    fetcher = loopback(HOST)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fetcher.read, [server.url("/a.png")] * 8)) == [b"picture"] * 8


@pytest.mark.parametrize(
    "host", ["IMAGES.Example", "images.example.", "xn--bcher-kva.example", "BÜCHER.example", "bücher。example"]
)
def test_hosts_are_compared_in_one_form(server, host):
    server.routes["/a.png"] = answer()
    table = {HOST: [["127.0.0.1"]], "xn--bcher-kva.example": [["127.0.0.1"]]}
    for allowed in ({HOST, "bücher.example"}, {"Images.EXAMPLE.", "xn--bcher-kva.example"}):
        fetcher = Fetcher(frozenset(allowed), QUICK, lambda _: True, Hosts(table))
        assert fetcher.read(server.url("/a.png", host)) == b"image"


@pytest.mark.parametrize(
    "path",
    ["/a%20b.png", "/a%2Fb%7e.png?X=a%2Bb%3D%2F%7e&y=+%20", "/a.png?", "/(a),'b'!/;c=1:2@3/$&+.png"],
)
def test_what_is_a_proper_uri_is_asked_for_as_it_is(server, path):
    server.routes[path.partition("?")[0]] = answer()
    assert loopback(HOST).read(server.url(path)) == b"image"
    assert server.asked == [path.removesuffix("?")]


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/a b.png", "/a%20b.png"), ("/é.png", "/%C3%A9.png"), ("/100%.png", "/100%25.png"), ("/a.png#part", "/a.png")],
)
def test_other_characters_are_encoded(server, path, asked):
    server.routes[asked] = answer()
    assert loopback(HOST).read(server.url(path)) == b"image"


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/a.png",
        "http://images.example.evil.example/a.png",
        "http://evil.example/images.example",
        "http://evil.example#@images.example/",
        "http://evil.example?@images.example/",
        "http://images.exampl\u0435/a.png",
        "http://127.0.0.1/a.png",
        "http://images/a.png",
        "http://images.example../a.png",
        "http://images.example%00.evil.example/",
        "http://images%2eexample/a.png",
        "http:///a.png",
        "http://",
        "http://*/",
        "http://images.example:99999/",
        "http://images.example:80:80/",
        "http://images.example:port/",
        "http://[::1/",
        "http://a b/",
        "http://\udc00/",
        "ftp://images.example/a.png",
        "file:///etc/passwd",
        "//images.example/a.png",
        "a.png",
        "",
    ],
)
def test_other_hosts_and_schemes_are_refused_without_a_look_up(url):
    fetcher = loopback(HOST)
    with pytest.raises(RequestError, match="cannot be fetched: "):
        fetcher.read(url)
    assert fetcher.resolver.lookups == []


def test_a_refused_host_is_named_with_the_remedy():
    with pytest.raises(RequestError) as caught:
        loopback(HOST).read("http://Evil.example:8080/a.png")
    assert str(caught.value) == (
        "image 'http://Evil.example:8080/a.png' cannot be fetched: it leads to host 'evil.example', "
        "which is not allowed; --allow-image-host evil.example lifts this"
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example@evil.example/",
        "http://images.example:80@evil.example/",
        "http://evil.example@images.example/",
        "http://user:password@images.example/",
        "http://evil\\@images.example/",
        "http://images.example\\@evil.example/",
        "http://images.example\\.evil.example/",
        "http://@images.example/",
        "http://:@images.example/",
        "http://a@b@images.example/",
        "http://images.example%40evil.example/",
        "http://images.example＠evil.example/",
        "http://evil.example／@images.example/",
    ],
)
def test_users_and_what_hides_hosts_are_refused(url):
    fetcher = loopback(HOST)
    with pytest.raises(RequestError, match=r"carries a user or password|is no valid URL|is no host") as caught:
        fetcher.read(url)
    assert "user:" not in str(caught.value)
    assert fetcher.resolver.lookups == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1.2.3",
        "localhost",
        "LOCALHOST.",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "168.63.129.16",
        "192.0.0.192",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
        "127.0.0.1.",
        "１２７.0.0.1",
        "①②⑦.0.0.1",
        "127。0。0。1",
        "ⓛocalhost",
        "[::1]",
        "[::]",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:10.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::10.0.0.1]",
        "[64:ff9b:1::8.8.8.8]",
        "[2002:a00:1::]",
        "[2001::1]",
        "[fe80::1]",
        "[fec0::1]",
        "[fd00:ec2::254]",
        "[ff02::1]",
        "[4000::1]",
    ],
)
def test_private_addresses_are_refused_even_if_their_host_is_allowed(host):
    with pytest.raises(RequestError, match=r"which is not( a)? public") as caught:
        strict(host).read(f"http://{host}/a.png")
    assert "127.0.0.1" in str(caught.value) or "localhost" not in host.lower()


@pytest.mark.parametrize(
    "host",
    [
        *("2130706433", "0x7f.1", "0x7f000001", "017700000001", "0177.0.0.1", "127.0.0.01", "127.1", "0", "0x"),
        *("1.2.3.4.5", "256.1.1.1", "evil.0x7f", "[fe80::1%25eth0]", "[::ffff:127.1]", "%31%32%37.0.0.1"),
    ],
)
def test_unusual_forms_of_addresses_are_refused(host):
    plain = Fetcher(frozenset({"127.0.0.1", "0.0.0.0"}), QUICK)
    with pytest.raises(RequestError, match=r"is no host|is not allowed"):
        plain.read(f"http://{host}/a.png")
    with pytest.raises(RequestError, match=r"is no host|is not public"):
        strict(host).read(f"http://{host}/a.png")


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "192.0.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::"],
)
def test_public_addresses_are_told_from_private_ones(address):
    assert is_public_address(address)


@pytest.mark.parametrize(
    "address", ["fe80::1%eth0", "2606:4700::1111%eth0", "::", "192.0.0.8", "239.1.1.1", "198.18.0.1"]
)
def test_private_addresses_are_told_from_public_ones(address):
    assert not is_public_address(address)


def test_an_address_is_connected_to_only_if_it_is_public(server):
    server.routes["/a.png"] = answer()
    fetcher = Fetcher(frozenset({"127.0.0.1"}), QUICK, is_public=lambda _: True)
    assert fetcher.read(server.url("/a.png", "127.0.0.1")) == b"image"
    with pytest.raises(RequestError, match=r"address 127\.0\.0\.1, which is not public"):
        strict("127.0.0.1").read(server.url("/a.png", "127.0.0.1"))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:127.0.0.1"], ["fe80::1%eth0"], ["64:ff9b::7f00:1"]]
)
def test_a_host_with_any_private_address_is_refused(server, addresses):
    server.routes["/a.png"] = answer()
    fetcher = Fetcher(frozenset({HOST}), QUICK, resolver=Hosts({HOST: [addresses]}))
    with pytest.raises(RequestError, match=f"host '{HOST}' at .*, which is not a public address"):
        fetcher.read(server.url("/a.png"))
    assert server.asked == []


def test_the_address_that_was_checked_is_the_one_connected_to(server):
    # a name server that tells the check one thing and the connection another
    server.routes["/a.png"] = in_turn(answer(503), answer())
    hosts = Hosts({HOST: [["127.0.0.1"], ["127.0.0.2"]]})
    fetcher = Fetcher(frozenset({HOST}), QUICK, lambda address: address == "127.0.0.1", hosts)
    with pytest.raises(RequestError, match=r"at 127\.0\.0\.2"):
        fetcher.read(server.url("/a.png"))
    assert hosts.lookups == [HOST, HOST]
    assert server.asked == ["/a.png"]


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, server.url("", "127.0.0.1"))
    with pytest.raises(RequestError, match="not a public address"):
        strict("localhost").read("http://localhost:1/a.png")
    assert server.asked == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_between_allowed_hosts_are_followed(server, status):
    server.routes["/dir/start"] = answer(status, b"", {"Location": "next?x=%2F", "Set-Cookie": "a=b; Path=/"})
    server.routes["/dir/next"] = redirect(server.url("/end", "cdn.example"), status)
    server.routes["/end"] = redirect(server.url("/last").removeprefix("http:"), status)
    server.routes["/last"] = answer()
    fetcher = loopback(HOST, "cdn.example")
    assert fetcher.read(server.url("/dir/start")) == b"image"
    assert server.asked == ["/dir/start", "/dir/next?x=%2F", "/end", "/last"]
    assert not any("Cookie" in headers for headers in server.headers)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://evil.example/a.png", "leads to host 'evil.example', which is not allowed"),
        ("//evil.example/a.png", "leads to host 'evil.example', which is not allowed"),
        ("http://169.254.169.254/latest/meta-data/", "leads to host '169.254.169.254', which is not allowed"),
        ("http://10.0.0.1/", "leads to the address 10.0.0.1, which is not public"),
        ("http://[::ffff:10.0.0.1]/", "leads to the address ::ffff:a00:1, which is not public"),
        ("http://inside.example/", "leads to host 'inside.example' at 10.0.0.1, which is not a public address"),
        ("http://2130706433/", "is no host"),
        ("http://images.example@evil.example/", "carries a user or password"),
        ("http://images.example\\@evil.example/", "URL"),
        ("/\\evil.example/", "404 Not Found"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("ftp://images.example/", "scheme 'ftp'"),
        ("data:image/png;base64,AAAA", "scheme 'data'"),
        ("javascript:alert(1)", "scheme 'javascript'"),
        ("http://:80/", "is no host"),
        ("http://images.example:port/", "is no valid URL"),
    ],
)
def test_redirects_obey_the_same_rules(server, location, reason):
    server.routes["/a.png"] = redirect(location)
    table = {HOST: [["127.0.0.1"]], "inside.example": [["10.0.0.1"]], "10.0.0.1": [], "::ffff:10.0.0.1": []}

    def is_public(address):
        return ip_address(address).is_loopback or is_public_address(address)

    with pytest.raises((RequestError, ImageError)) as caught:
        Fetcher(frozenset(table), QUICK, is_public, Hosts(table)).read(server.url("/a.png"))
    assert reason in str(caught.value)


def test_redirects_come_to_an_end(server):
    server.routes["/loop"] = redirect("/loop")
    with pytest.raises(RequestError, match=f"redirected more than {MAX_REDIRECTS} times"):
        loopback(HOST).read(server.url("/loop"))
    assert len(server.asked) == MAX_REDIRECTS + 1
    for number in range(MAX_REDIRECTS):
        server.routes[f"/{number}"] = redirect(f"/{number + 1}")
    server.routes[f"/{MAX_REDIRECTS}"] = answer()
    assert loopback(HOST).read(server.url("/0")) == b"image"


@pytest.mark.parametrize("status", [300, 304, 305, 306])
def test_other_answers_of_that_kind_are_not_followed(server, status):
    server.routes |= {"/a.png": redirect("/b.png", status), "/b.png": answer()}
    with pytest.raises(ImageError, match=f"cannot be fetched: {status}"):
        loopback(HOST).read(server.url("/a.png"))


@pytest.fixture
def certificate(tmp_path):
    """Write the key and the self-signed certificate of a host."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "host.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + built.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def secure(server, certificate):
    """Return the server, speaking TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server


def test_https_needs_a_valid_certificate(secure):
    secure.routes["/a.png"] = answer()
    with pytest.raises(StorageError, match="certificate verify failed") as caught:
        loopback(HOST).read(secure.url("/a.png", scheme="https"))
    assert "attempts" not in str(caught.value)
    assert secure.asked == []


def test_https_is_not_left_for_http(secure, certificate, monkeypatch):
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)
    secure.routes |= {"/a.png": answer(), "/up": redirect("/a.png"), "/down": redirect(f"http://{HOST}/a.png")}
    fetcher = loopback(HOST)
    assert fetcher.read(secure.url("/a.png", "Images.example.", "https")) == b"image"
    assert fetcher.read(secure.url("/up", scheme="https")) == b"image"
    with pytest.raises(RequestError, match="redirected from https to http"):
        fetcher.read(secure.url("/down", scheme="https"))


@pytest.mark.parametrize(
    ("status", "answered"),
    [
        *((400, "400 Bad Request"), (401, "401 Unauthorized"), (403, "403 Forbidden"), (404, "404 Not Found")),
        *((410, "410 Gone"), (416, "416"), (204, "204 No Content"), (206, "206 Partial Content"), (499, "499")),
    ],
)
def test_what_the_server_does_not_have_is_an_image_error(server, status, answered):
    server.routes["/a.png"] = answer(status, b"" if status == 204 else b"image")
    with pytest.raises(ImageError, match=rf"^image 'http://.*/a\.png' cannot be fetched: {answered}") as caught:
        loopback(HOST).read(server.url("/a.png"))
    assert SECRET not in str(caught.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 507, 520, 599])
def test_a_busy_or_broken_server_is_asked_again(server, status):
    server.routes["/a.png"] = in_turn(answer(status), answer(status), answer())
    assert loopback(HOST).read(server.url("/a.png")) == b"image"
    assert len(server.asked) == 3


def test_dropped_connections_are_tried_again(server, caplog):
    short = answer(headers={"Content-Length": "6"})
    server.routes["/a.png"] = in_turn(reset, reset, short, answer())  # aiohttp itself repeats what was not answered
    with caplog.at_level(logging.WARNING):
        assert loopback(HOST).read(server.url("/a.png")) == b"image"
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("route", [answer(503), answer(507), reset, answer(headers={"Content-Length": "6"})])
def test_a_server_that_stays_broken_is_a_storage_error(server, route):
    server.routes["/a.png"] = route
    with pytest.raises(StorageError, match=r"^cannot fetch image 'http://.*/a\.png': .* \(3 attempts\)$") as caught:
        loopback(HOST).read(server.url("/a.png"))
    assert not isinstance(caught.value, StorageFullError)
    assert len(server.asked) >= 3


def test_absent_servers_and_names_are_storage_errors():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(StorageError, match=r"Cannot connect to host .* \(3 attempts\)"):
        loopback(HOST).read(f"http://{HOST}:{port}/a.png")
    with pytest.raises(StorageError, match=r"DNS lookup failed.* \(3 attempts\)"):
        Fetcher(frozenset({"absent.example"}), QUICK, resolver=Hosts({})).read("http://absent.example/a.png")


def test_what_is_no_http_is_a_storage_error(server):
    server.routes["/a.png"] = lambda handler: handler.wfile.write(b"220 smtp.example ESMTP\r\n")
    with pytest.raises(StorageError, match="the answer is no valid HTTP"):
        loopback(HOST).read(server.url("/a.png"))


def test_a_body_of_just_the_limit_is_taken_and_one_more_byte_is_not(server):
    server.routes |= {"/fits": answer(body=b"x" * 1000), "/large": answer(body=b"x" * 1001)}
    assert len(loopback(HOST).read(server.url("/fits"))) == 1000
    with pytest.raises(RequestError, match=r"^image '.*' cannot be fetched: it is larger than 1000 bytes$"):
        loopback(HOST).read(server.url("/large"))
    assert server.asked == ["/fits", "/large"]


@pytest.mark.parametrize(
    "route",
    [
        endless(),
        endless(b"10000\r\n" + b"x" * 2**16 + b"\r\n", {"Transfer-Encoding": "chunked"}),
        endless(headers={"Content-Length": str(2**40)}),
        answer(headers={"Content-Length": str(2**40)}),  # refused by the announcement: nothing else would come
    ],
)
def test_huge_bodies_are_refused_at_the_limit(server, route):
    server.routes["/huge"] = route
    with pytest.raises(RequestError, match="larger than 1000 bytes"):
        loopback(HOST).read(server.url("/huge"))
    assert len(server.asked) == 1


def test_a_body_longer_than_announced_is_cut(server):
    server.routes["/a.png"] = answer(body=b"image and more", headers={"Content-Length": "5"})
    with suppress(StorageError):  # what follows may be taken for a broken answer
        assert loopback(HOST).read(server.url("/a.png")) == b"image"


@pytest.mark.parametrize("length", ["-1", "five", "5, 6", "1e3", "0x10"])
def test_a_length_that_is_none_is_a_storage_error(server, length):
    server.routes["/a.png"] = answer(headers={"Content-Length": length})
    with pytest.raises(StorageError, match="cannot fetch image"):
        loopback(HOST).read(server.url("/a.png"))


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
def test_compressed_answers_are_not_unpacked(server, encoding):
    bomb = gzip.compress(bytes(10**6))
    assert len(bomb) > QUICK.max_bytes * 0.9
    server.routes["/a.png"] = answer(body=bomb[:900], headers={"Content-Encoding": encoding})
    with pytest.raises(ImageError, match="the server compresses it"):
        loopback(HOST).read(server.url("/a.png"))


def test_an_answer_that_says_it_is_not_compressed_is_taken(server):
    server.routes["/a.png"] = answer(headers={"Content-Encoding": "Identity"})
    assert loopback(HOST).read(server.url("/a.png")) == b"image"


@pytest.mark.parametrize("drip", [b"", b"x"])
def test_slow_servers_are_given_up(server, drip):
    server.routes["/slow"] = endless(drip, pause_s=0.02)
    started = time.monotonic()
    with pytest.raises(StorageError, match="cannot fetch image"):
        loopback(HOST, limits=DownloadLimits(1000, timeout_s=0.3)).read(server.url("/slow"))
    assert time.monotonic() - started < 3
    assert len(server.asked) <= 1


def test_slow_redirects_count_together(server):
    def slowly(handler):
        time.sleep(0.1)
        redirect("/slow")(handler)

    server.routes["/slow"] = slowly
    with pytest.raises(StorageError, match="in time"):
        loopback(HOST, limits=DownloadLimits(1000, timeout_s=0.3)).read(server.url("/slow"))


def test_silent_connections_are_given_up():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        url = f"https://{HOST}:{silent.getsockname()[1]}/a.png?key={SECRET}"  # the handshake is never answered
        limits = DownloadLimits(1000, timeout_s=30.0, connect_timeout_s=0.1, attempts=2, first_wait_s=0.01)
        with pytest.raises(StorageError, match=r"Connection timeout .* \(2 attempts\)") as caught:
            loopback(HOST, limits=limits).read(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


FAILURES = {
    "absent": answer(404),
    "broken": answer(503),
    "damaged": lambda handler: handler.wfile.write(b"HTTP/1.1 ??\r\n\r\n"),
    "cut": answer(headers={"Content-Length": "6"}),
    "huge": answer(body=b"x" * 2000),
    "compressed": answer(headers={"Content-Encoding": "gzip"}),
    "elsewhere": redirect(f"http://evil.example/?X-Amz-Signature={SECRET}"),
    "insider": redirect(f"http://user:{SECRET}@images.example/"),
    "nowhere": redirect(f"http://[{SECRET}/?key={SECRET}"),
    "loop": lambda handler: redirect(handler.path)(handler),
    "reset": reset,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_no_message_shows_the_query_of_a_url(server, failure, caplog):
    server.routes["/a.png"] = FAILURES[failure]
    with caplog.at_level(logging.DEBUG), pytest.raises((RequestError, ImageError, StorageError)) as caught:
        loopback(HOST).read(server.url(f"/a.png?key={SECRET}&X-Amz-Signature={SECRET}"))
    shown_to_people = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert SECRET not in shown_to_people
    assert server.url("/a.png?***") in shown_to_people


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@images.example/",
        f"http://{SECRET}@images.example/",
        f"http://[::1?key={SECRET}",
        f"http://images.example:port/?{SECRET}",
        f"http://evil.example/?x=1\n{SECRET}",
        f"http://absent.example/?{SECRET}",
        f"http://images.example/..?{SECRET}",
    ],
)
def test_no_message_shows_a_password_or_query_of_what_is_refused(url):
    with pytest.raises((RequestError, StorageError)) as caught:
        Fetcher(frozenset({HOST, "absent.example"}), QUICK, resolver=Hosts({})).read(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_relative_uris_are_joined_to_a_root_on_a_web_server(server):
    server.routes |= {"/data/a%20b.png": answer(), "/data/sub/c.png": answer(body=b"C")}
    fetcher = Fetcher(frozenset(), QUICK, lambda _: True, Hosts({HOST: [["127.0.0.1"]]}))
    for root in (server.url("/data"), server.url("/data/", "Images.example."), server.url("/data?key=1")):
        assert fetcher.read("a b.png", root) == fetcher.read("a%20b.png?x=1", root) == b"image"
        assert fetcher.read("./sub/c.png", root) == fetcher.read("/data/sub/c.png", root) == b"C"
        assert fetcher.read(server.url("/data/sub/c.png"), root) == b"C"
    assert fetcher.read("data/sub/c.png", server.url("")) == b"C"


@pytest.mark.parametrize(
    "uri",
    [
        "/secret.png",
        "/data2/a.png",
        "{url}/secret.png",
        "http://images.example/data/a.png",
        "https:{rest}/data/a.png",
        "//evil.example/data/a.png",
        "http://evil.example/data/a.png",
        "s3://bucket/data/a.png",
        "file:///etc/passwd",
        "/",
    ],
)
def test_what_does_not_lie_below_a_root_on_a_web_server_is_refused(server, uri):
    fetcher = Fetcher(frozenset(), QUICK, lambda _: True, Hosts({HOST: [["127.0.0.1"]]}))
    uri = uri.format(url=server.url(""), rest=server.url("").removeprefix("http:"))
    with pytest.raises(RequestError, match=r"is not allowed|neither http nor https"):
        fetcher.read(uri, server.url("/data"))
    assert server.asked == []


DOTS = ["..", "%2e%2e", "%2E.", ".%2e", "%252e%252e", "%25252e.", "%%32%65%2e"]


CLIMBING = ["{}/a.png", "b/{}/a.png", "b%2f{}%2fa.png", "b%5c{}\\a.png", "b%252F{}", "{}"]


def test_dot_segments_are_seen_however_encoded():
    assert [uri for path in CLIMBING for dots in DOTS if not climbs(uri := path.format(dots))] == []


@pytest.mark.parametrize("uri", ["b/%2e%2e/a.png", "%%32%65%2e/a.png", "b%5c..\\a.png"])
def test_dot_segments_are_refused_with_and_without_a_root(server, uri):
    for given, root in ((uri, server.url("/data")), (server.url(f"/data/{uri}"), None)):
        with pytest.raises(RequestError, match="lies outside the image root"):
            loopback(HOST).read(given, root)
    assert server.asked == []


def test_other_dots_are_not_refused(server):
    for name in ("a..png", "..a", "...", "%2e", "100%", "%zz", "a%20b", "é", "%c3%a9", ""):
        assert not climbs(f"sub/{name}")
    server.routes["/a..png"] = answer()
    assert loopback(HOST).read(server.url("/a..png?back=/../x#/../")) == b"image"


def test_texts_encoded_without_end_are_refused_at_once():
    started = time.monotonic()
    assert climbs("%" + "25" * 10**6 + "2e")
    assert time.monotonic() - started < 5


def test_host_names_have_one_form():
    assert host_name("Images.EXAMPLE.") == "images.example"
    assert host_name("bücher.example") == host_name("XN--bcher-kva.example") == "xn--bcher-kva.example"
    assert host_name("8.8.8.8") == "8.8.8.8"
    assert host_name("[2606:4700:0::1111]") == host_name("2606:4700::1111") == "2606:4700::1111"
    assert host_name("under_score.example") == "under_score.example"


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "*", "*.example", "a..b", "https://a.example", "a.example:80", "a.example/b", "user@a.example"),
        *("a b", "127.1", "a" * 64, "a,b", "a\n.example"),
    ],
)
def test_what_is_no_host_cannot_be_allowed(text):
    with pytest.raises(RequestError, match="is no host"):
        host_name(text)


def test_web_urls_are_told_from_other_uris():
    assert all(map(is_web, ("http://a", "HTTPS://a/b?c", "http://")))
    assert not any(map(is_web, ("http", "http:/a", " http://a", "s3://a", "file:///a", "xhttp://a", "a.png", "")))


def test_urls_are_shown_without_their_secrets():
    assert shown(f"https://user:{SECRET}@a.example/b@c.png?d={SECRET}\n{SECRET}") == "https://***@a.example/b@c.png?***"
    assert shown(f"http://a.example/#token={SECRET}") == "http://a.example/#***"
    assert shown("a.png") == "a.png"


def test_a_relative_url_alone_leads_nowhere():
    with pytest.raises(RequestError, match="scheme ''"):
        web_url("//images.example/a.png")
