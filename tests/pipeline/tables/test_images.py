"""Input images: nothing outside the root and the allowed hosts is read, whatever the URI looks like."""

import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from pipeline.request import RequestError
from pipeline.tables.image_download import ImageError
from pipeline.tables.images import ImageRoot

SECRET = b"secret"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(b"A")
    (root / "sub" / "b c.png").write_bytes(b"B")
    (root / "é#?%20.png").write_bytes(b"E")
    (root / "link.png").symlink_to("sub/b c.png")
    (root / "loop").symlink_to("loop")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "outside").symlink_to(tmp_path)
    (root / "%2e%2e").mkdir()
    (tmp_path / "secret.png").write_bytes(SECRET)
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "a.png").write_bytes(SECRET)
    os.mkfifo(root / "pipe")
    return root


@pytest.fixture
def memory(tmp_path):
    fs, base = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    fs.pipe({f"{base}/root/a.png": b"A", f"{base}/root/sub/b.png": b"B"})
    fs.pipe({f"{base}/secret.png": SECRET, f"{base}/root2/a.png": SECRET})
    yield f"memory:/{base}"
    fs.rm(base, recursive=True)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *arguments):
        pass


@pytest.fixture
def web(folder):
    """Serve the folder on this machine; return the server's URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder.parent)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


LOOPBACK = frozenset({"127.0.0.1"})


def everything(_address):
    """Take every address for a public one."""
    return True


@pytest.mark.parametrize(
    ("uri", "data"),
    [
        ("a.png", b"A"),
        ("./a.png", b"A"),
        ("sub/b c.png", b"B"),
        ("sub/../a.png", b"A"),
        ("link.png", b"B"),
        ("é#?%20.png", b"E"),
        ("{root}/a.png", b"A"),
        ("file://{root}/a.png", b"A"),
        ("{root}/../root/sub/b c.png", b"B"),
    ],
)
def test_relative_and_full_uris_below_the_root_are_read(folder, uri, data, monkeypatch):
    assert ImageRoot(str(folder)).read(uri.format(root=folder)) == data
    assert ImageRoot(f"file://{folder}").read(uri.format(root=folder)) == data
    monkeypatch.chdir(folder.parent)
    assert ImageRoot("root").read(uri.format(root=folder)) == data


@pytest.mark.parametrize(
    "uri",
    [
        "../secret.png",
        "sub/../../secret.png",
        "../root2/a.png",
        "{root}2/a.png",
        "{parent}/secret.png",
        "file://{parent}/secret.png",
        "file://../secret.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "/proc/self/environ",
        "out.png",
        "outside/secret.png",
        "file://file:///etc/passwd",
        "FILE:///etc/passwd",
        "s3://bucket/a.png",
        "memory://a.png",
        "simplecache::file:///etc/passwd",
    ],
)
def test_uris_outside_the_root_are_refused(folder, uri):
    uri = uri.format(root=folder, parent=folder.parent)
    with pytest.raises(RequestError, match="lies outside the image root") as caught:
        ImageRoot(str(folder)).read(uri)
    assert repr(uri) in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        ".",
        " ",
        "sub",
        "{root}",
        "file://",
        "absent.png",
        "a.png/b",
        "a.png\n",
        "a\0.png",
        "loop",
        "pipe",
        "%2e%2e/secret.png",
        "..%2fsecret.png",
        "..\\secret.png",
        "~/secret.png",
        "$HOME",
        "*",
        "\ud800",
        "x" * 5000,
    ],
)
def test_what_is_no_readable_file_is_an_image_error(folder, uri):
    with pytest.raises(ImageError, match=r"^image "):
        ImageRoot(str(folder)).read(uri.format(root=folder))


def test_huge_files_are_refused_before_they_fill_the_memory(folder, monkeypatch):
    monkeypatch.setattr(ImageRoot, "max_bytes", 10)
    (folder / "fits").write_bytes(b"x" * 10)
    (folder / "huge").write_bytes(b"x" * 11)
    assert len(ImageRoot(str(folder)).read("fits")) == 10
    with pytest.raises(RequestError, match="larger than 10 bytes"):
        ImageRoot(str(folder)).read("huge")


@pytest.mark.parametrize("ending", ["", "/"])
def test_objects_below_the_root_are_read(memory, ending):
    root = ImageRoot(f"{memory}/root{ending}")
    assert root.read("a.png") == root.read(f"{memory}/root/a.png") == b"A"
    assert root.read("sub/b.png") == root.read(f"{memory.removeprefix('memory:/')}/root/sub/b.png") == b"B"


@pytest.mark.parametrize(
    "uri",
    [
        "../secret.png",
        "sub/../../secret.png",
        "sub/../a.png",
        "{memory}/secret.png",
        "{memory}/root2/a.png",
        "{memory}/root/../secret.png",
        "{memory}/root/sub/../../secret.png",
        "memory://memory://secret.png",
        "{path}/secret.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "s3://bucket/a.png",
        "%2e%2e/secret.png",
        "%252e%252E/secret.png",
        "sub%2f..%2f../secret.png",
        "{memory}/root/.%2e/secret.png",
        "..\\secret.png",
    ],
)
def test_objects_outside_the_root_are_refused(memory, uri):
    with pytest.raises(RequestError, match="lies outside the image root"):
        ImageRoot(f"{memory}/root").read(uri.format(memory=memory, path=memory.removeprefix("memory:/")))


@pytest.mark.parametrize("uri", ["", "sub", "absent.png", "a%20.png", "a..png", "a\0"])
def test_absent_objects_are_an_image_error(memory, uri):
    with pytest.raises(ImageError, match=r"^image "):
        ImageRoot(f"{memory}/root").read(uri)


@pytest.fixture(params=["folder", "memory", "web"])
def root(request):
    """Return a root of each kind that holds a.png."""
    place = str(request.getfixturevalue(request.param))
    return place if request.param == "folder" else f"{place}/root"


def test_images_of_allowed_hosts_are_read_whatever_the_root(root, web):
    images_of = ImageRoot(root, LOOPBACK, everything)
    assert images_of.read("a.png") == b"A"
    assert images_of.read(f"{web}/root/sub/b%20c.png") == b"B"
    assert images_of.read(f"{web.upper()}/root2/a.png") == SECRET


def test_hosts_that_nobody_allowed_are_refused(root):
    for scheme in ("http", "https", "HTTP"):
        with pytest.raises(RequestError, match=r"host 'evil\.example', which is not allowed; --allow-image-host evil"):
            ImageRoot(root, LOOPBACK, everything).read(f"{scheme}://evil.example/a.png")


def test_private_addresses_are_refused_though_their_host_is_allowed(root):
    for uri in ("http://127.0.0.1/a.png", "http://localhost:1/a.png", "https://[::1]/a.png"):
        with pytest.raises(RequestError, match=r"which is not( a)? public"):
            ImageRoot(root, frozenset({"127.0.0.1", "localhost", "::1"})).read(uri)


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_root_on_a_web_server_needs_no_allowed_host(web, ending):
    root = ImageRoot(f"{web}/root{ending}", is_public=everything)
    assert root.read("a.png") == root.read(f"{web}/root/a.png") == root.read("/root/a.png") == b"A"
    assert root.read("sub/b c.png") == root.read("sub/b%20c.png") == b"B"


@pytest.mark.parametrize(
    "uri",
    ["../secret.png", "%2e%2e/secret.png", "/secret.png", "{web}/secret.png", "{web}/root2/a.png", "//evil/a.png"],
)
def test_what_lies_outside_a_root_on_a_web_server_is_refused(web, uri):
    with pytest.raises(RequestError, match=r"lies outside the image root|is not allowed"):
        ImageRoot(f"{web}/root", is_public=everything).read(uri.format(web=web))


def test_a_root_at_a_private_address_serves_no_images(web):
    with pytest.raises(RequestError, match="which is not public"):
        ImageRoot(f"{web}/root").read("a.png")


def test_what_a_web_server_does_not_have_is_an_image_error(web):
    with pytest.raises(ImageError, match=r"^image '.*absent\.png\?\*\*\*' cannot be fetched: 404"):
        ImageRoot("root", LOOPBACK, everything).read(f"{web}/absent.png?key=secret")


def test_huge_files_of_web_servers_are_refused(folder, web, monkeypatch):
    monkeypatch.setattr(ImageRoot, "max_bytes", 10)
    (folder / "huge").write_bytes(b"x" * 11)
    with pytest.raises(RequestError, match="larger than 10 bytes"):
        ImageRoot(f"{web}/root", is_public=everything).read("huge")


def test_messages_show_no_secrets_of_object_store_urls(memory):
    with pytest.raises(RequestError, match=r"image 's3://bucket/a\.png\?\*\*\*' lies outside"):
        ImageRoot(f"{memory}/root").read("s3://bucket/a.png?X-Amz-Signature=secret&key=secret")
