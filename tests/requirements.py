"""What marked tests need of the machine: its absence is an error with one line that mends it, never a silent skip."""

import shutil
import sys
from collections.abc import Callable, Iterable

# marker: (program, Debian package that has it)
PROGRAMS = {
    "compiler": ("g++", "g++"),
    "browser": ("chromium", "chromium"),
    "database": ("pg_ctlcluster", "postgresql"),
}


def packages(find: Callable[[str], str | None] = shutil.which) -> list[str]:
    """Return the Debian packages of the programs that are not installed."""
    return [package for program, package in PROGRAMS.values() if find(program) is None]


def lacking(markers: Iterable[str], find: Callable[[str], str | None] = shutil.which) -> list[str]:
    """Return one line per marker whose program is not installed."""
    wanted = [(marker, *PROGRAMS[marker]) for marker in sorted(set(markers)) if marker in PROGRAMS]
    return [
        f"{marker} tests need {program}: apt-get install {package}"
        for marker, program, package in wanted
        if find(program) is None
    ]


if __name__ == "__main__":
    sys.stdout.write(" ".join(packages()))
