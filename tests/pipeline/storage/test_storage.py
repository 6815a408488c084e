"""Storage writes whole files, lists what is there, lets no path out of its root, and waits only where that helps."""

import errno
import http.client
import logging
import os
import pickle
import resource
import ssl
import stat
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from pipeline.storage import storage as storage_module
from pipeline.storage.faults import StorageError, StorageFullError
from pipeline.storage.paths import TEMPORARY_PREFIX
from pipeline.storage.storage import Retries, Storage

pytest_plugins = ["tests.pipeline.s3_server"]

QUICK = Retries(first_wait_s=0.001)


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.integration)])
def storage(request, tmp_path):
    if request.param == "s3":
        return Storage(f"s3://{request.getfixturevalue('bucket')}/out")
    return Storage(str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}/out")


@pytest.fixture
def memory(tmp_path):
    return Storage(f"memory://{tmp_path.name}/out", QUICK)


def test_what_is_put_is_what_is_got(storage):
    storage.put("videos/0f/a.mp4", b"first")
    storage.put("videos/0f/a.mp4", b"second, longer")
    assert storage.get("videos/0f/a.mp4") == b"second, longer"
    assert storage.exists("videos/0f/a.mp4")
    assert not storage.exists("videos/0f/b.mp4")


def test_a_local_file_can_be_put(storage, tmp_path):
    source = tmp_path / "source.mp4"
    source.write_bytes(b"x" * 100_000)
    storage.put("a.mp4", source)
    assert storage.get("a.mp4") == source.read_bytes()


def test_the_time_of_the_last_write_is_told_in_utc(storage):
    before = datetime.now(UTC)
    storage.put("v/a", b"x")
    first = storage.modified("v/a")
    assert first.tzinfo is UTC
    assert abs(first - before) < timedelta(minutes=1)
    deadline = time.monotonic() + 60
    while storage.modified("v/a") == first:  # S3 counts whole seconds
        assert time.monotonic() < deadline
        storage.put("v/a", b"x")
    assert storage.modified("v/a") > first


def test_an_absent_file_has_no_time(storage):
    storage.put("v/a", b"x")
    with pytest.raises(StorageError, match="cannot look for"):
        storage.modified("v/b")


def test_list_is_sorted_recursive_and_relative(storage):
    paths = [
        "metadata/part-1.parquet",
        "videos/0f/b.mp4",
        "videos/0f/a.mp4",
        "videos2/c.mp4",
        "job.json",
        "with blank/é.txt",
    ]
    for path in paths:
        storage.put(path, b"x")
    assert storage.list() == sorted(paths)
    assert storage.list("videos") == ["videos/0f/a.mp4", "videos/0f/b.mp4"]
    assert all(storage.get(path) == b"x" for path in storage.list())


def test_what_others_do_is_seen_at_once(storage):
    other = pickle.loads(pickle.dumps(storage))
    assert not storage.exists("v/a")
    assert storage.list("v") == []
    other.put("v/a", b"x")
    assert storage.exists("v/a")
    assert storage.exists("v")
    assert storage.list("v") == ["v/a"]
    other.delete("v/a")
    assert not storage.exists("v/a")
    assert storage.list("v") == []


def test_threads_may_share_it(storage):
    names = [f"v/{number}" for number in range(16)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(storage.put, names, [name.encode() for name in names]))
        assert list(pool.map(storage.get, names)) == [name.encode() for name in names]
    assert storage.list() == sorted(names)


def test_a_file_has_nothing_below_it(storage):
    storage.put("a", b"x")
    assert not storage.exists("a/b")


def test_an_absent_folder_lists_as_empty(storage):
    assert storage.list() == []
    assert storage.list("videos/0f") == []


def test_a_file_is_no_folder_to_list(storage):
    storage.put("a", b"x")
    assert storage.list("a") == []


def test_deleting_twice_is_fine(storage):
    storage.put("a/b", b"x")
    storage.delete("a/b")
    storage.delete("a/b")
    assert not storage.exists("a/b")


def test_reading_an_absent_file_is_an_error_with_its_cause(storage):
    with pytest.raises(StorageError, match=r"cannot read .*absent") as caught:
        storage.get("absent")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_paths_out_of_the_root_are_refused_by_every_method(storage):
    calls = [partial(storage.put, data=b"x"), storage.get, storage.exists, storage.modified, storage.size]
    calls += [partial(storage.download, target=Path("absent")), storage.delete, storage.url, storage.list]
    for call in calls:
        with pytest.raises(StorageError, match=r"path '\.\./a' has a '\.' or"):
            call("../a")


def test_names_without_a_meaning_are_just_names(storage):
    paths = ["a..b", "...", "~", "$HOME", "*", "a:b", "-rf", ".hidden", "a#?[0]"]
    for path in paths:
        storage.put(path, path.encode())
    assert storage.list() == sorted(paths)
    assert [storage.get(path) for path in paths] == [path.encode() for path in paths]
    for path in paths:
        storage.delete(path)
        assert not storage.exists(path)
    assert storage.list() == []


def test_probe_leaves_nothing(storage):
    storage.probe()
    assert storage.list() == []


def test_storage_travels(storage):
    copy = pickle.loads(pickle.dumps(storage))
    copy.put("a", b"x")
    assert storage.get("a") == b"x"
    assert copy.url("a") == storage.url("a")
    assert repr(copy) == repr(storage)


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage("out")
    monkeypatch.chdir("/")
    storage.put("a", b"x")
    assert (tmp_path / "out" / "a").read_bytes() == b"x"


def test_urls_are_full(tmp_path):
    assert Storage(str(tmp_path)).url("v/a.mp4") == f"file://{tmp_path}/v/a.mp4"
    assert Storage(f"file://{tmp_path}/").url("a") == f"file://{tmp_path}/a"
    assert Storage("memory://m/out").url("a") == "memory:///m/out/a"


def test_a_write_that_fails_half_way_shows_nothing_and_keeps_the_old_file(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.put("a", b"old")

    def breaks_half_way(source, target):
        Path(target).write_bytes(b"hal")
        raise OSError("no space left on device")

    monkeypatch.setattr(storage_module.shutil, "copyfile", breaks_half_way)
    with pytest.raises(StorageError, match="no space left"):
        storage.put("a", tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert storage.get("a") == b"old"


def test_what_a_killed_process_left_is_not_listed(tmp_path):
    storage = Storage(str(tmp_path))
    storage.put("videos/a.mp4", b"x")
    (tmp_path / "videos" / f"{TEMPORARY_PREFIX}0123").write_bytes(b"half")
    assert storage.list() == ["videos/a.mp4"]


def test_written_files_are_readable_as_the_umask_says(tmp_path):
    Storage(str(tmp_path)).put("a", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_deleting_a_folder_is_an_error(tmp_path):
    storage = Storage(str(tmp_path))
    storage.put("videos/a", b"x")
    with pytest.raises(StorageError, match="cannot delete"):
        storage.delete("videos")
    assert storage.list() == ["videos/a"]


def test_probe_says_in_one_line_why_output_is_not_writable(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="not writable") as caught:
        Storage(str(tmp_path / "file")).probe()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "empty"),
        ("nope://a/b", "nope"),
        ("/", "names no folder"),
        ("s3://", "names no folder or bucket"),
        ("simplecache::memory://a", "chain"),
    ],
)
def test_unusable_urls_are_refused(url, reason):
    with pytest.raises(StorageError, match=reason):
        Storage(url)


@pytest.mark.parametrize(
    "url", ["s3://AKIA1234:hidden@bucket/out", "ftp://me:hidden@host/out", "https://host/out?X-Amz-Signature=hidden"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(StorageError, match="environment") as caught:
        Storage(url)
    assert "hidden" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("scheme", "package", "remedy"),
    [("s3", "s3fs", r"pip install 'pyramid-render\[s3\]'"), ("gs", "gcsfs", "install gcsfs")],
)
def test_the_error_for_a_missing_driver_names_what_to_install(monkeypatch, scheme, package, remedy):
    monkeypatch.delitem(_registry, scheme, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StorageError, match=f"cannot use {scheme}://bucket/out as storage.*{remedy}"):
        Storage(f"{scheme}://bucket/out")


def driver_error(name, base=Exception, /, **attributes):
    """Make an exception as a driver would raise it."""
    error = type(name, (base,), {})("said the store")
    vars(error).update(attributes)
    return error


def chained(error, cause):
    error.__cause__ = cause
    return error


class HasStatus:
    def __init__(self, status_code):
        self.status_code = status_code


PASSING = [
    ConnectionResetError("reset"),
    ConnectionRefusedError("refused"),
    BrokenPipeError("pipe"),
    TimeoutError("slow"),
    http.client.IncompleteRead(b"half"),
    OSError(errno.EBUSY, "Please reduce your request rate."),
    OSError(errno.ESTALE, "Stale file handle"),
    driver_error("ClientError", response={"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}),
    chained(
        OSError(errno.EIO, "Bad Gateway"), driver_error("ClientError", response={"Error": {"Code": "502"}}, status=502)
    ),
    driver_error("EndpointConnectionError", type("HTTPClientError", (Exception,), {})),
    chained(FileNotFoundError("upload"), driver_error("ClientError", response={"Error": {"Code": "NoSuchUpload"}})),
    driver_error("HttpError", code=429),
    driver_error("HttpError", code="503"),
    driver_error("HttpResponseError", status_code=500, error_code="OperationTimedOut"),
    driver_error("ServiceResponseError"),
    driver_error("HTTPError", OSError, response=HasStatus(504)),
    driver_error("ClientResponseError", status=503),
    chained(driver_error("ClientPayloadError"), driver_error("ContentLengthError", code=400)),
    driver_error("ReadTimeout", type("TransportError", (Exception,), {})),
]
FINAL = [
    PermissionError("Access Denied"),
    FileNotFoundError("no such bucket"),
    IsADirectoryError("folder"),
    OSError(errno.EROFS, "Read-only file system"),
    OSError(errno.EACCES, "Permission denied"),
    OSError(errno.EIO, "Input/output error"),
    ValueError("wrong"),
    chained(driver_error("SSLError", ConnectionError), ssl.SSLCertVerificationError("self-signed certificate")),
    driver_error(
        "ClientError", response={"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    ),
    driver_error("NoCredentialsError"),
    driver_error("HttpError", code=403),
    driver_error("ResourceNotFoundError", status_code=404, error_code="ContainerNotFound"),
    driver_error("HTTPError", OSError, response=HasStatus(401)),
]
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    driver_error("HttpError", code=507),
    driver_error("HTTPError", OSError, response=HasStatus(507)),
    chained(OSError(errno.EIO, "no"), driver_error("ClientError", response={"Error": {"Code": "QuotaExceeded"}})),
]


def failing(monkeypatch, error, times, method="pipe_file"):
    """Have a method of memory:// fail some times; return the list that grows with each call."""
    calls = []
    real = getattr(MemoryFileSystem, method)

    def fails(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) <= times:
            raise error
        return real(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, method, fails)
    return calls


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_passing_faults_of_any_driver_are_met_with_patience(memory, monkeypatch, error):
    calls = failing(monkeypatch, error, times=3)
    memory.put("a", b"x")
    assert memory.get("a") == b"x"
    assert len(calls) == 4


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_lasting_faults_of_any_driver_are_raised_at_once(memory, monkeypatch, error):
    calls = failing(monkeypatch, error, times=100)
    with pytest.raises(StorageError, match=r"cannot write memory://.*/out/a: ") as caught:
        memory.put("a", b"x")
    assert type(caught.value) is StorageError
    assert caught.value.__cause__ is error
    assert len(calls) == 1


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_a_full_store_has_its_own_error(memory, monkeypatch, error):
    calls = failing(monkeypatch, error, times=100)
    with pytest.raises(StorageFullError, match=r"cannot write memory://.*/out/a: there is no room left: ") as caught:
        memory.put("a", b"x")
    assert caught.value.__cause__ is error
    assert len(calls) == 1


def test_an_earlier_failure_does_not_colour_a_later_one(memory, monkeypatch):
    calls = failing(monkeypatch, ConnectionResetError("reset"), times=QUICK.attempts)
    with pytest.raises(StorageError, match="6 attempts"):
        memory.put("a", b"x")
    cat = failing(monkeypatch, FileNotFoundError("absent"), 100, "cat_file")
    try:
        raise StorageError("earlier") from ConnectionResetError("reset")
    except StorageError:
        with pytest.raises(StorageError, match=r"absent$"):
            memory.get("absent")
    assert (len(calls), len(cat)) == (6, 1)


def test_waits_grow_are_drawn_and_are_bounded(tmp_path, monkeypatch, caplog):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    failing(monkeypatch, ConnectionResetError("reset"), times=1000)
    storage = Storage(f"memory://{tmp_path.name}")
    runs = []
    for _ in range(20):
        with caplog.at_level(logging.ERROR), pytest.raises(StorageError, match=r"reset \(6 attempts\)"):
            storage.put("a", b"x")
        runs.append(tuple(waits))
        waits.clear()
    assert all(
        longest / 2 <= wait <= longest for run in runs for wait, longest in zip(run, (2, 4, 8, 16, 30), strict=True)
    )
    assert len(set(runs)) == 20


def test_slow_failures_are_tried_twice_and_again_only_in_the_window(tmp_path, monkeypatch):
    calls = failing(monkeypatch, TimeoutError("slow"), times=100)
    storage = Storage(f"memory://{tmp_path.name}", Retries(first_wait_s=0.001, window_s=0))
    with pytest.raises(StorageError, match=r"slow \(2 attempts\)"):
        storage.put("a", b"x")
    assert len(calls) == 2


def test_a_retry_is_logged_with_its_number(memory, monkeypatch, caplog):
    failing(monkeypatch, ConnectionResetError("reset by peer"), times=1)
    memory.put("a", b"x")
    (record,) = [record for record in caplog.records if record.name == "pipeline.storage.faults"]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"cannot write {memory.url('a')}: reset by peer; attempt 1 of 6, next in 0.0 s"


def test_its_patience_travels_with_it(tmp_path):
    assert pickle.loads(pickle.dumps(Storage(str(tmp_path), QUICK))).retries == QUICK


def test_an_interrupt_is_not_retried(memory, monkeypatch):
    calls = failing(monkeypatch, KeyboardInterrupt(), times=100)
    with pytest.raises(KeyboardInterrupt):
        memory.put("a", b"x")
    assert len(calls) == 1


SECRETS = [
    ("https://host/a.mp4?X-Amz-Credential=AKIAHIDDENHIDDEN1234&X-Amz-Signature=hidden", "https://host/a.mp4?"),
    ("https://account.blob.core.windows.net/c/a?sv=2024&sig=hidden%3D", "https://account.blob.core.windows.net/c/a?"),
    ("proxy http://me:hidden@proxy:3128 refused", "proxy:3128 refused"),
    ("headers {'Authorization': 'Bearer hidden', 'Host': 'h'}", "'Host': 'h'"),
    (
        "Authorization: AWS4-HMAC-SHA256 Credential=hidden/2026/us, SignedHeaders=host, Signature=hidden",
        "SignedHeaders=host",
    ),
    ("AWS_SECRET_ACCESS_KEY=hidden", "AWS_SECRET_ACCESS_KEY="),
    ("DefaultEndpointsProtocol=https;AccountKey=hidden==;EndpointSuffix=x", "EndpointSuffix=x"),
    ('{"access_token": "hidden", "expires": 3}', '"expires": 3'),
    ("the key AKIAHIDDEN1234567890 is unknown", "is unknown"),
]


@pytest.mark.parametrize(("message", "kept"), SECRETS)
def test_no_secret_gets_into_errors_or_logs(memory, monkeypatch, caplog, message, kept):
    failing(monkeypatch, chained(ConnectionResetError(message), ValueError(message)), times=100)
    with caplog.at_level(logging.DEBUG), pytest.raises(StorageError) as caught:
        memory.put("a", b"x")
    for told in ("".join(traceback.format_exception(caught.value)), caplog.text):
        assert "hidden" not in told.lower()
        assert kept in told


def test_what_arrives_damaged_is_sent_again_or_removed(memory, monkeypatch):
    real = MemoryFileSystem.pipe_file
    lengths = [1, 2, 3]

    def cuts_off(self, path, value, **options):
        real(self, path, value[: lengths.pop(0)], **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", cuts_off)
    memory.put("a", b"xyz")
    assert memory.get("a") == b"xyz"
    lengths.extend([1] * QUICK.attempts)
    with pytest.raises(StorageError, match=r"1 of 3 bytes arrived \(6 attempts\)"):
        memory.put("a", b"xyz")
    assert memory.list() == []


def test_two_writers_of_one_name_do_no_harm_to_each_other(memory, monkeypatch):
    real = MemoryFileSystem.pipe_file
    others = [b"of another writer"]

    def overtaken(self, path, value, **options):
        real(self, path, value, **options)
        if others:
            real(self, path, others.pop(), **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", overtaken)
    monkeypatch.setattr(MemoryFileSystem, "rm_file", lambda *_: pytest.fail("a file of the other's was removed"))
    memory.put("a", b"xyz")
    assert memory.get("a") == b"xyz"


def test_what_a_store_has_lost_at_once_is_sent_again(memory, monkeypatch):
    real = MemoryFileSystem.pipe_file
    losses = [True, False]

    def loses(self, path, value, **options):
        real(self, path, value, **options)
        if losses.pop(0):
            self.rm_file(path)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", loses)
    memory.put("a", b"xyz")
    assert memory.get("a") == b"xyz"


def test_a_store_that_cannot_be_asked_does_not_answer_no(memory, monkeypatch):
    failing(monkeypatch, PermissionError("Forbidden"), 100, "info")
    with pytest.raises(StorageError, match=r"cannot look for .*Forbidden"):
        memory.exists("a")


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.put("open/a", b"x")
    storage.put("closed/b", b"x")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError("Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StorageError, match=r"cannot list .*Permission denied"):
        storage.list()
    assert storage.list("open") == ["open/a"]


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("requires the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def small_files():
    """Forbid files of more than 1 MiB to this process: during the call only, since coverage writes a larger one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(params=["bytes", "file"])
def two_mib(request, tmp_path):
    """The content of a file, or a file with it."""
    data = b"x" * 2**21
    if request.param == "bytes":
        return data
    (tmp_path / "data").write_bytes(data)
    return tmp_path / "data"


def refuses_what_has_no_room(folder, data):
    storage = Storage(str(folder))
    storage.put("v/a", b"old")
    for path in ("v/a", "v/b"):
        with pytest.raises(StorageFullError, match=r"cannot write .*no room left") as caught:
            storage.put(path, data)
        assert isinstance(caught.value.__cause__, OSError)
    assert [path.name for path in folder.rglob("*")] == ["v", "a"]
    assert storage.get("v/a") == b"old"
    storage.put("v/b", b"small")


@pytest.mark.integration
def test_a_full_disk_keeps_the_old_file_and_nothing_else(two_mib, small_disk):
    refuses_what_has_no_room(small_disk, two_mib)


def test_a_limit_of_file_sizes_counts_as_full(tmp_path, two_mib):
    with small_files():
        refuses_what_has_no_room(tmp_path / "out", two_mib)


@pytest.mark.parametrize(
    ("start", "stop", "part"), [(2, 5, b"234"), (None, 3, b"012"), (8, None, b"89"), (9, 20, b"9")]
)
@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_part_of_a_file_is_read(tmp_path, scheme, start, stop, part):
    storage = Storage(f"{scheme}://{tmp_path}/out")
    storage.put("a", b"0123456789")
    assert storage.get("a", start, stop) == part
    assert storage.signed_url("a", 60) is None
