"""The signals that end a command, and its exit code."""

import signal
from collections.abc import Callable
from types import FrameType

from jobs.settings import EXIT_INTERRUPTED


def interrupt() -> None:
    """End the command as Ctrl-C ends any Python program."""
    raise KeyboardInterrupt


class Signals:
    """Takes SIGINT and SIGTERM; `exit_code` says which one came last, `on_signal` is called for each."""

    def __init__(self, on_signal: Callable[[], None] = interrupt) -> None:
        self.exit_code = EXIT_INTERRUPTED
        self.on_signal = on_signal

    def install(self) -> None:
        """Take the signals from now on; after ray.init, which replaces handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.take)

    def take(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        self.exit_code = 128 + number
        self.on_signal()
