"""An output goes on with what it was begun with, and with nothing else."""

import pytest

from pipeline.storage.storage import Storage
from pipeline.training.record import RecordError, check_record


def test_the_same_settings_go_on_and_others_are_refused(tmp_path):
    storage = Storage(str(tmp_path))
    check_record(storage, "a.json", {"model": "x", "sizes": (1, 2)})
    check_record(storage, "a.json", {"sizes": [1, 2], "model": "x"})
    for other in ({"model": "y", "sizes": [1, 2]}, {"model": "x"}, {"model": "x", "sizes": [1, 2], "lora": 4}):
        with pytest.raises(RecordError, match="use another output"):
            check_record(storage, "a.json", other)
