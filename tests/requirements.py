"""What marked tests need of the machine: its absence is an error with one line that mends it, never a silent skip."""

import shutil
from collections.abc import Callable, Iterable

PROGRAMS = {
    "compiler": ("g++", "apt-get install g++"),
    "browser": ("chromium", "apt-get install chromium"),
    "database": ("pg_ctlcluster", "apt-get install postgresql"),
}


def lacking(markers: Iterable[str], find: Callable[[str], str | None] = shutil.which) -> list[str]:
    """Return one line per marker whose program is not installed."""
    wanted = [(marker, *PROGRAMS[marker]) for marker in sorted(set(markers)) if marker in PROGRAMS]
    return [f"{marker} tests need {program}: {line}" for marker, program, line in wanted if find(program) is None]
