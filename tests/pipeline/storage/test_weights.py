"""Models in an object store: brought to a node once, whole, checked, and no further than needed."""

import hashlib
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.ledger import ledger
from pipeline.storage.storage import Storage
from pipeline.storage.weights import LOCK, SUMS, local_copy, open_checkpoint
from pyramid_flow import Checkpoint, CheckpointError
from pyramid_flow.checkpoints.layout import needed_files
from tests.pipeline.sample_tables import write_table
from tests.pyramid_flow.goldens import TINY_MINIFLUX

pytest_plugins = ["tests.pipeline.s3_server"]

TOY = Checkpoint.open("toy").root
WEIGHTS = "diffusion_transformer_384p/diffusion_pytorch_model.safetensors"


def upload(folder: Path, storage: Storage, *, sums: bool = True) -> list[str]:
    """Put a model into a store, with what it does not need; returns the names of what it does."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name, path in files.items():
        storage.put(name, path)
    storage.put("text_encoder/pytorch_model.bin", b"a pickle")
    storage.put("diffusion_transformer_768p/config.json", b"{}")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{name}\n" for name, path in files.items())
    if sums:
        storage.put(SUMS, "".join(lines).encode())
    return needed_files(files, [])


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A node's cache with nothing in it."""
    monkeypatch.setattr("pipeline.storage.weights.cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Return an object store in memory; whatever the store, a copy sizes, lists and downloads whole files."""
    return f"memory://{tmp_path.name}"


@pytest.fixture
def stored(store: str) -> tuple[Storage, list[str]]:
    storage = Storage(f"{store}/models/tiny-miniflux")
    return storage, upload(TINY_MINIFLUX, storage)


@pytest.fixture
def stored_in_s3(bucket: str) -> tuple[Storage, list[str]]:
    storage = Storage(f"s3://{bucket}/models/tiny-miniflux")
    return storage, upload(TINY_MINIFLUX, storage)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note which files are downloaded."""
    names, original = [], Storage.download

    def download(self: Storage, path: str, target: Path) -> None:
        names.append(path)
        original(self, path, target)

    monkeypatch.setattr(Storage, "download", download)
    return names


def test_a_copy_is_what_is_stored_and_nothing_that_is_not_needed(cache, stored, downloads):
    storage, names = stored
    checkpoint = open_checkpoint(storage.uri, "384p")
    assert checkpoint.fingerprint == Checkpoint.open(TINY_MINIFLUX).fingerprint
    assert checkpoint.name == Checkpoint.open(TINY_MINIFLUX).name
    copied = {path.relative_to(checkpoint.root).as_posix() for path in checkpoint.root.rglob("*") if path.is_file()}
    assert copied == set(names) == set(downloads)
    downloads.clear()
    assert local_copy(storage.uri, "384p") == checkpoint.root
    assert downloads == []


def test_a_broken_download_goes_on_where_it_stopped(cache, stored, monkeypatch):
    storage, _ = stored
    size, begun = storage.size(WEIGHTS), []

    def download(self: Storage, path: str, target: Path) -> None:
        if path == WEIGHTS:
            begun.append(target.stat().st_size if target.exists() else 0)
            if len(begun) == 1:
                target.write_bytes(self.get(path)[: size // 2])
                raise ConnectionError("the node is gone")
        original(self, path, target)

    original = Storage.download
    monkeypatch.setattr(Storage, "download", download)
    with pytest.raises(ConnectionError):
        local_copy(storage.uri, "384p")
    folder = local_copy(storage.uri, "384p")
    assert begun == [0, size // 2]
    assert (folder / WEIGHTS).read_bytes() == (TINY_MINIFLUX / WEIGHTS).read_bytes()


@pytest.mark.integration
def test_faults_of_the_store_are_waited_out(s3, cache, stored_in_s3):
    storage, _ = stored_in_s3
    s3.fail("resets in answer", "GET", WEIGHTS)
    folder = local_copy(storage.uri, "384p")
    assert (folder / WEIGHTS).read_bytes() == (TINY_MINIFLUX / WEIGHTS).read_bytes()
    assert not s3.pending()
    s3.requests.clear()
    assert local_copy(storage.uri, "384p") == folder
    assert s3.count("GET", "safetensors") == 0


def test_a_file_that_is_not_what_its_checksum_says_is_refused_until_it_is(cache, stored):
    storage, _ = stored
    right = (TINY_MINIFLUX / WEIGHTS).read_bytes()
    storage.put(WEIGHTS, right[:-1] + b"?")
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is not what SHA256SUMS says it is"):
        local_copy(storage.uri, "384p")
    assert not list(cache.rglob(f"{WEIGHTS}*"))
    storage.put(WEIGHTS, right)
    assert (local_copy(storage.uri, "384p") / WEIGHTS).read_bytes() == right


def test_a_file_that_changed_in_the_store_is_fetched_again(cache, store, caplog):
    storage = Storage(f"{store}/tiny")
    upload(TINY_MINIFLUX, storage, sums=False)
    folder = local_copy(storage.uri, "384p")
    assert "has no SHA256SUMS: only the sizes of its files are checked" in caplog.text
    storage.put("pyramid.json", b'{"fps": 12}')
    assert (local_copy(storage.uri, "384p") / "pyramid.json").read_bytes() == b'{"fps": 12}'
    assert (folder / WEIGHTS).exists()


def test_what_is_not_there_is_said(cache, stored, store):
    storage, _ = stored
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at memory://.*/nothing"):
        local_copy(f"{store}/nothing", None)
    with pytest.raises(CheckpointError, match="there is no variant 'image', there are: 384p"):
        local_copy(storage.uri, "image")


def test_a_full_disk_is_said_before_anything_is_fetched(cache, stored, downloads, monkeypatch):
    storage, _ = stored
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr("pipeline.storage.weights.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs [0-9]+ bytes in .*, and 1000 are free"):
        local_copy(storage.uri, "384p")
    assert downloads == []


def test_a_copy_waits_for_the_process_that_fetches_it(cache, stored, monkeypatch):
    storage, _ = stored
    folder = local_copy(storage.uri, "384p")
    held, waiting = FileLock(folder.parent / LOCK), []
    held.acquire()

    def log(message: str, *_: object) -> None:
        waiting.append(message)
        held.release()

    monkeypatch.setattr("pipeline.storage.weights.logger.info", log)
    assert local_copy(storage.uri, "384p") == folder
    assert waiting == ["%s: waiting for the process that fetches it"]


FETCH = """
import sys
from pathlib import Path
from pipeline.storage import weights

weights.cache_folder = lambda: Path(sys.argv[1])
weights.local_copy(sys.argv[2], "384p")
"""


@pytest.mark.integration
def test_processes_of_a_node_fetch_a_model_once(s3, cache, stored_in_s3):
    storage, names = stored_in_s3
    command = [sys.executable, "-c", FETCH, str(cache), storage.uri]
    s3.requests.clear()
    with ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, cwd=Path(__file__).parents[3])) for _ in range(2)]
    assert [process.returncode for process in processes] == [0, 0]
    assert {name: s3.count("GET", f"/{name}") for name in names} == dict.fromkeys(names, 1)


@pytest.mark.ray
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_job_renders_with_a_stored_model(bucket, tmp_path):
    url = f"s3://{bucket}/models/toy"
    upload(TOY, Storage(url))
    small = {"num_frames": 9, "num_inference_steps": 2, "video_num_inference_steps": 1}
    table = write_table(tmp_path / "in.parquet", [{"prompt": "a red ball", **small}])
    command = [sys.executable, "-m", "jobs.cli", "render", "--input", str(table), "--output", str(tmp_path / "out")]
    subprocess.run([*command, "--model", url, "--variant", "toy", "--device", "cpu"], check=True, timeout=280)
    [row] = ledger.read(Storage(str(tmp_path / "out"))).to_pylist()
    assert (row["status"], row["model"]) == ("succeeded", "toy/toy")
    assert row["model_fingerprint"] == Checkpoint.open("toy").fingerprint
