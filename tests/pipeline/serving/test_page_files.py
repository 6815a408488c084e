"""The page's files: small, and without references to other hosts."""

import re

from pipeline.serving.http.web_page import FOLDER

MAX_BYTES = 60 * 1024
NAMESPACE = "http://www.w3.org/2000/svg"


def test_the_page_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= MAX_BYTES


def test_the_page_names_no_other_host():
    for path in FOLDER.rglob("*"):
        text = path.read_text().replace(NAMESPACE, "")
        assert not re.search(r"https?:|['\"(]//", text), path.name


def test_all_files_of_the_page_are_referenced():
    texts = {path.name: path.read_text() for path in FOLDER.rglob("*")}
    for name in texts.keys() - {"index.html"}:
        assert any(name in text for other, text in texts.items() if other != name), name
