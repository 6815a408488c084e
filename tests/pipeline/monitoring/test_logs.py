"""A worker's log: a JSON object per line, with the fields of what is worked on."""

import json
import subprocess
import sys

PROGRAM = """
import logging
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pipeline.monitoring.logs import log_as_json, log_fields

log_as_json(node="here")
logger = logging.getLogger("test")
with log_fields(request_id="a"):
    with log_fields(videos=["v"]):
        logger.info("both", extra={"more": 1})
        with ThreadPoolExecutor() as pool:
            pool.submit(copy_context().run, logger.warning, "thread")
    logger.info("one")
logger.info("none")
"""


def test_lines_hold_the_fields_of_what_is_worked_on():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    both, thread, one, none = map(json.loads, done.stderr.splitlines())
    assert (both["node"], both["levelname"], both["name"]) == ("here", "INFO", "test")
    assert (both["request_id"], both["videos"], both["more"]) == ("a", ["v"], 1)
    assert (thread["message"], thread["request_id"], thread["videos"]) == ("thread", "a", ["v"])
    assert (one["request_id"], "videos" in one) == ("a", False)
    assert "request_id" not in none
