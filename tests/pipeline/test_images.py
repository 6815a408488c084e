"""Input images: nothing outside the root is read, whatever the URI looks like."""

import os

import fsspec
import pytest

from pipeline import images
from pipeline.images import ImageError, ImageRoot
from pipeline.request import RequestError

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
        "http://localhost/a.png",
        "https://localhost/a.png",
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
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
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
        "http://localhost/a.png",
    ],
)
def test_objects_outside_the_root_are_refused(memory, uri):
    with pytest.raises(RequestError, match="lies outside the image root"):
        ImageRoot(f"{memory}/root").read(uri.format(memory=memory, path=memory.removeprefix("memory:/")))


@pytest.mark.parametrize("uri", ["", "sub", "absent.png", "%2e%2e/secret.png", "..\\secret.png", "a\0"])
def test_absent_objects_are_an_image_error(memory, uri):
    with pytest.raises(ImageError, match=r"^image "):
        ImageRoot(f"{memory}/root").read(uri)
