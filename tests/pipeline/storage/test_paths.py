"""Storage paths are relative and stay below the root."""

import pytest

from pipeline.storage.faults import StorageError
from pipeline.storage.paths import TEMPORARY_PREFIX, check_path

REFUSED = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../a",
    "a/../../b",
    "a/..",
    ".",
    "./a",
    "a//b",
    "a/",
    "\\\\host\\share",
    "a\\..\\b",
    "C:\\a",
    "s3://bucket/a",
    "file:///etc/passwd",
    "a\0b",
    "a\nb",
    f"{TEMPORARY_PREFIX}a",
    f"a/{TEMPORARY_PREFIX}b/c",
    "a?versionId=b",
]


@pytest.mark.parametrize("path", REFUSED)
def test_paths_out_of_the_root_and_reserved_names_are_refused(path):
    with pytest.raises(StorageError, match="path"):
        check_path(path)


@pytest.mark.parametrize("path", ["a", "a/b.mp4", "a..b", "...", "~", "$HOME", "*", "a:b", "-rf", ".hidden", "a#?[0]"])
def test_other_names_are_accepted(path):
    check_path(path)
