"""What an output was made with, kept beside it: going on with something else is refused."""

import json
from collections.abc import Mapping

from pipeline.storage.storage import Storage
from pyramid_flow.errors import PyramidFlowError


class RecordError(PyramidFlowError):
    """An output was made with other settings."""


def check_record(storage: Storage, name: str, values: Mapping[str, object]) -> None:
    """Write down what an output is made with; raises RecordError if it was begun with anything else.

    values: as JSON can hold them.
    """
    if not storage.exists(name):
        storage.put(name, (json.dumps(values, indent=2) + "\n").encode())
        return
    known = json.loads(storage.get(name))
    for key in known.keys() | values.keys():
        old, new = known.get(key), values.get(key)
        if json.dumps(old) != json.dumps(new):
            raise RecordError(f"{storage.url(name)} says {key} {old}, not {new}: use another output")
