"""Storage over the S3 protocol outlives a failing store, and fails at once where waiting would not help."""

import logging
import multiprocessing
import os
import pickle
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import fsspec.config
import httpx2 as httpx
import pytest
import s3fs

from pipeline.storage import storage as storage_module
from pipeline.storage.faults import StorageError, StorageFullError
from pipeline.storage.storage import Retries, Storage

pytest_plugins = ["tests.pipeline.s3_server"]
pytestmark = pytest.mark.integration

QUICK = Retries(first_wait_s=0.01)
LARGE = bytes(range(256)) * (20 * 2**20 // 256)
METHODS = {"put": "PUT", "get": "GET", "exists": "HEAD", "list": "GET", "delete": "DELETE"}


@pytest.fixture
def storage(bucket):
    return Storage(f"s3://{bucket}/out", QUICK)


def call(storage, operation):
    """Do one operation on the file "a", which holds b"old", and check what comes back."""
    result = getattr(storage, operation)(*{"put": ("a", b"new"), "list": ()}.get(operation, ("a",)))
    assert result == {"get": b"old", "exists": True, "list": ["a"]}.get(operation)


@pytest.mark.parametrize("operation", METHODS)
def test_every_operation_outlives_a_store_that_is_busy(s3, storage, operation):
    storage.put("a", b"old")
    s3.fail((503, "SlowDown"), METHODS[operation], times=3)
    call(storage, operation)
    assert not s3.pending()


@pytest.mark.parametrize("operation", METHODS)
def test_every_operation_outlives_broken_connections(s3, storage, operation):
    storage.put("a", b"old")
    s3.fail("resets", METHODS[operation], times=2)
    call(storage, operation)
    assert not s3.pending()


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (429, "TooManyRequests"),
        (500, "InternalError"),
        (502, "BadGateway"),
        (503, "ServiceUnavailable"),
        (504, "GatewayTimeout"),
        (400, "RequestTimeout"),
        (400, "BadDigest"),
    ],
)
def test_passing_faults_are_waited_out(s3, storage, status, code):
    s3.fail((status, code), "PUT", times=2)
    storage.put("a", b"x")
    assert storage.get("a") == b"x"
    assert s3.count("PUT") == 3


def test_a_connection_reset_in_the_middle_of_an_upload_is_repeated(s3, storage):
    s3.fail("resets", "PUT", times=2, read_bytes=100_000)
    storage.put("a", b"x" * 1_000_000)
    assert storage.get("a") == b"x" * 1_000_000
    assert s3.count("PUT") == 3


def test_a_connection_reset_in_the_middle_of_a_download_is_repeated(s3, storage):
    storage.put("a", b"x" * 1_000_000)
    s3.fail("resets in answer", "GET", times=2)
    assert storage.get("a") == b"x" * 1_000_000
    assert s3.count("GET") == 3


def test_an_answer_that_was_lost_does_no_harm(s3, storage):
    s3.fail("loses answer", "PUT")
    storage.put("a", b"x")
    assert storage.get("a") == b"x"


def test_a_server_that_says_nothing_is_asked_again(s3, storage, monkeypatch):
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 1)
    s3.fail("holds", "PUT")
    storage.put("a", b"x")
    assert s3.count("PUT") >= 2


@pytest.mark.parametrize("data", [b"x", LARGE], ids=["small", "large"])
def test_a_server_that_takes_no_bytes_is_asked_again(s3, bucket, monkeypatch, caplog, data):
    monkeypatch.setattr(storage_module, "SLOWEST_UPLOAD", 2**23)
    storage = Storage(f"s3://{bucket}/out", Retries(first_wait_s=0.01, upload_timeout_s=2))
    s3.fail("stalls", "PUT")
    storage.put("a", data)
    assert storage.get("a") == data
    assert not s3.pending()
    assert s3.open_uploads(bucket) == []
    assert "the store did not answer in time; attempt 1 of 6" in caplog.text


def test_each_retry_is_logged_with_its_number(s3, storage, caplog):
    s3.fail((503, "SlowDown", "Please reduce your request rate."), "PUT", times=2)
    with caplog.at_level(logging.WARNING):
        storage.put("a", b"x")
    lines = [record.getMessage() for record in caplog.records if record.name == "pipeline.storage.faults"]
    assert len(lines) == 2
    assert all(f"cannot write {storage.url('a')}: " in line for line in lines)
    assert "reduce your request rate.; attempt 1 of 6, next in 0.0 s" in lines[0]
    assert "attempt 2 of 6" in lines[1]


def test_a_store_that_stays_broken_is_given_up(s3, storage):
    s3.fail((503, "SlowDown"), "PUT", times=100)
    with pytest.raises(StorageError, match=r"cannot write .*/out/a: .*\(6 attempts\)") as caught:
        storage.put("a", b"x")
    assert not isinstance(caught.value, StorageFullError)
    assert s3.count("PUT") == QUICK.attempts


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "AccessDenied"), (403, "SignatureDoesNotMatch"), (404, "NoSuchBucket"), (400, "InvalidX")],
)
def test_a_refusal_is_final(s3, storage, status, code):
    s3.fail((status, code, "Not for you"), "PUT", times=100)
    with pytest.raises(StorageError, match=r"cannot write .*Not for you$") as caught:
        storage.put("a", b"x")
    assert not isinstance(caught.value, StorageFullError)
    assert isinstance(caught.value.__cause__, OSError)
    assert s3.count("PUT") == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [(507, "XMinioStorageFull"), (507, "other"), (403, "QuotaExceeded"), (400, "XMinioAdminBucketQuotaExceeded")],
)
def test_a_full_bucket_is_said_to_be_full(s3, storage, status, code):
    s3.fail((status, code, "Quota used up"), "PUT", times=100)
    with pytest.raises(StorageFullError, match=r"cannot write .*no room left: .*Quota used up"):
        storage.put("a", b"x")
    assert s3.count("PUT") == 1


def test_a_bucket_that_gets_full_on_the_way_shows_nothing(s3, bucket, storage, large):
    s3.fail((403, "QuotaExceeded"), "PUT", "partNumber=3")
    with pytest.raises(StorageFullError, match="no room left"):
        storage.put("a", large)
    assert s3.keys(bucket) == s3.open_uploads(bucket) == []


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_no_part_is_in_flight_when_an_upload_is_aborted(s3, storage, large, kind):
    s3.fail((403, "QuotaExceeded"), "PUT", "partNumber=1")
    with pytest.raises(StorageFullError):
        storage.put("a", LARGE if kind == "bytes" else large)
    assert s3.count("PUT", "partNumber") == s3.count("DELETE", "uploadId=") == 1


def test_a_probe_that_fails_leaves_nothing(s3, bucket, storage):
    s3.fail((403, "AccessDenied"), "GET")
    with pytest.raises(StorageError, match="not writable"):
        storage.probe()
    assert s3.keys(bucket) == []


def test_a_store_that_may_not_be_asked_does_not_answer_no(s3, storage):
    storage.put("a", b"x")
    s3.fail((403, ""), "HEAD", times=100)
    with pytest.raises(StorageError, match=r"cannot look for .*Forbidden"):
        storage.exists("a")
    assert s3.count("HEAD") == 2  # that of put, and one


@pytest.mark.parametrize("operation", METHODS)
def test_an_absent_bucket_is_an_error_not_an_empty_one(s3, operation):
    storage = Storage("s3://bucket-that-is-not-there/out", QUICK)
    with pytest.raises(StorageError, match="bucket"):
        call(storage, operation)
    with pytest.raises(StorageError, match="not writable"):
        storage.probe()


@pytest.fixture
def large(tmp_path):
    (tmp_path / "large").write_bytes(LARGE)
    return tmp_path / "large"


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_a_large_file_goes_in_parts_and_only_the_failed_part_goes_twice(s3, bucket, large, monkeypatch, kind):
    monkeypatch.delitem(fsspec.config.conf, "s3")
    storage = Storage(f"s3://{bucket}/out", QUICK)
    s3.fail((503, "SlowDown"), "PUT", "partNumber=2")
    storage.put("a", LARGE if kind == "bytes" else large)
    assert storage.get("a") == LARGE
    assert s3.count("POST", "?uploads") == 1
    assert [s3.count("PUT", f"partNumber={number}") for number in (1, 2, 3, 4)] == [1, 2, 1, 0]


@pytest.mark.parametrize(
    "fault",
    [
        ((503, "SlowDown"), "POST", "uploads"),
        ((503, "SlowDown"), "PUT", "partNumber=3"),
        ("resets", "PUT", "partNumber=2", 1, 1_000_000),
        ((500, "InternalError"), "POST", "uploadId="),
        ("loses answer", "POST", "uploadId="),
    ],
    ids=["start", "part", "reset part", "end", "lost end"],
)
def test_an_upload_in_parts_outlives_a_fault_in_any_step(s3, bucket, storage, large, fault):
    s3.fail(*fault)
    storage.put("a", large)
    assert not s3.pending()
    assert storage.get("a") == LARGE
    assert s3.open_uploads(bucket) == []


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (403, "AccessDenied")])
def test_an_upload_in_parts_that_fails_shows_nothing_and_keeps_the_old_file(s3, bucket, storage, large, status, code):
    storage.put("old", b"old")
    s3.fail((status, code), "PUT", "partNumber=2", times=100)
    for path in ("old", "new"):
        with pytest.raises(StorageError, match="cannot write"):
            storage.put(path, large)
    assert s3.keys(bucket) == ["out/old"]
    assert s3.open_uploads(bucket) == []
    assert storage.get("old") == b"old"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that children of threaded processes may deadlock
def test_an_upload_whose_process_is_killed_shows_nothing(s3, bucket, storage):
    s3.fail("holds", "PUT", "partNumber=3", times=100)
    process = multiprocessing.get_context("fork").Process(target=storage.put, args=("a", LARGE))
    process.start()
    _wait_for(lambda: s3.count("PUT", "partNumber=3"))
    process.kill()
    process.join()
    assert s3.keys(bucket) == []
    assert storage.list() == []


def _wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_that_arrives_damaged_is_sent_again(s3, storage):
    s3.fail("claims one byte", "HEAD")
    storage.put("a", b"xyz")
    assert storage.get("a") == b"xyz"
    assert s3.count("PUT") == 2


def test_a_file_that_only_arrives_damaged_does_not_stay(s3, bucket, storage):
    s3.fail("claims one byte", "HEAD", times=100)
    with pytest.raises(StorageError, match=r"1 of 3 bytes arrived \(6 attempts\)"):
        storage.put("a", b"xyz")
    assert s3.keys(bucket) == []


def test_what_others_do_is_seen_at_once(s3, bucket, storage):
    storage.put("v/a", b"x")
    assert storage.list() == ["v/a"]
    assert not storage.exists("v/b")
    s3.behind("PUT", f"/{bucket}/out/v/b", b"longer")
    assert storage.list() == storage.list("v") == ["v/a", "v/b"]
    assert storage.exists("v/b")
    s3.behind("DELETE", f"/{bucket}/out/v/a")
    assert storage.list() == ["v/b"]
    assert not storage.exists("v/a")


def test_objects_that_stand_for_folders_are_no_files(s3, bucket, storage):
    s3.behind("PUT", f"/{bucket}/out/")
    s3.behind("PUT", f"/{bucket}/out/videos/")
    storage.put("videos/a", b"x")
    assert storage.list() == storage.list("videos") == ["videos/a"]


def test_threads_share_a_storage_in_bad_weather(s3, storage):
    s3.fail((503, "SlowDown"), "PUT", times=5)
    s3.fail("resets", "GET", times=5)
    names = [f"v/{number}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storage.put, names, [name.encode() for name in names]))
        assert list(pool.map(storage.get, names)) == [name.encode() for name in names]
        assert all(pool.map(storage.exists, names))
    assert storage.list() == sorted(names)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_processes_share_a_storage_that_was_used_before(s3, storage):
    storage.put("before", b"x")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=storage.put, args=(f"v/{number}", b"x")) for number in range(3)]
    for process in processes:
        process.start()
    storage.put("meanwhile", b"x")
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert storage.list() == ["before", "meanwhile", "v/0", "v/1", "v/2"]


def test_a_spawned_process_gets_the_same_place(s3, storage):
    process = multiprocessing.get_context("spawn").Process(target=storage.put, args=("a", b"x"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert storage.get("a") == b"x"


def test_the_bucket_itself_can_be_the_root(bucket):
    storage = Storage(f"s3://{bucket}", QUICK)
    storage.probe()
    storage.put("v/a", b"x")
    assert storage.list() == ["v/a"]
    assert storage.url("v/a") == f"s3://{bucket}/v/a"


def test_settings_of_the_driver_are_kept_and_its_retries_bounded(bucket, monkeypatch):
    user = {"config_kwargs": {"max_pool_connections": 3}}
    monkeypatch.setitem(fsspec.config.conf, "s3", user)
    made = []
    monkeypatch.setattr(s3fs.S3FileSystem, "__init__", _recording(s3fs.S3FileSystem.__init__, made))
    Storage(f"s3://{bucket}/out")
    assert made[0].config_kwargs["max_pool_connections"] == 3
    assert made[0].config_kwargs["retries"]["total_max_attempts"] == 2
    assert made[0].retries == 1
    assert user == {"config_kwargs": {"max_pool_connections": 3}}


def _recording(function, calls):
    def record(self, *arguments, **options):
        calls.append(self)
        function(self, *arguments, **options)

    return record


@pytest.mark.parametrize(("status", "code"), [(403, "InvalidAccessKeyId"), (503, "SlowDown")])
def test_no_secret_is_told(s3, storage, caplog, status, code):
    access_key, secret_key = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    message = f"key {access_key} secret={secret_key} at https://host/a?X-Amz-Signature=0123abcd"
    s3.fail((status, code, message), "PUT", times=100)
    with caplog.at_level(logging.INFO), pytest.raises(StorageError, match="cannot write") as caught:
        storage.put("a", b"x")
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    for secret in (access_key, secret_key, "0123abcd"):
        assert secret not in told
        assert secret.encode() not in pickle.dumps(storage)
    assert storage.url("a") in told


@pytest.mark.parametrize("as_file", [False, True])
def test_objects_say_what_they_are(bucket, storage, tmp_path, as_file):
    source = tmp_path / "source"
    source.write_bytes(b"x")
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    for name, kind in (("a.html", "text/html"), ("a.mp4", "video/mp4"), ("a.webp", "image/webp")):
        storage.put(name, source if as_file else b"x")
        assert fs.info(f"{bucket}/out/{name}")["ContentType"] == kind


def test_no_credentials_at_all_is_said_at_once(s3, bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"not writable: .*credentials"):
        Storage(f"s3://{bucket}/out", QUICK).probe()
    assert s3.requests == []


def test_a_signed_url_gives_a_part_of_a_file_to_anyone(storage):
    storage.put("a b.mp4", b"0123456789")
    url = storage.signed_url("a b.mp4", 60)
    assert httpx.get(url, headers={"Range": "bytes=2-4"}).content == b"234"
    assert storage.get("a b.mp4", 2, 5) == b"234"
