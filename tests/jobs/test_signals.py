"""Signals: what the first and the second one do, and the exit code they lead to."""

import signal

import pytest

from jobs.signals import Signals
from pipeline.batch.job import StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_cannot_stop_gently_ends_at_once(number, code):
    signals = Signals()
    with pytest.raises(KeyboardInterrupt):
        signals.take(number, None)
    assert signals.exit_code == code


def test_the_first_signal_asks_and_the_second_insists():
    stop = StopRequest()
    signals = Signals(stop.ask)
    assert not stop.requested
    signals.take(signal.SIGINT, None)
    assert stop.requested
    assert signals.exit_code == 130
    with pytest.raises(KeyboardInterrupt):
        signals.take(signal.SIGTERM, None)
    assert signals.exit_code == 143


def test_both_are_taken_once_installed():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    seen: list[int] = []
    try:
        Signals(lambda: seen.append(1)).install()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [1, 1]
