"""A request to stop: nothing before a signal, an exception after it."""

import signal

import pytest
from support import StopAfter

from critic_train.stopping import Stopped, StopRequest


def test_nobody_has_asked():
    stop = StopRequest()
    stop.check()
    stop.check_on_all_ranks()
    assert (stop.requested, stop.look(), stop.signal_number) == (False, False, None)


def test_a_signal_is_noticed_at_each_check():
    stop = StopRequest()
    stop.signal_number = signal.SIGTERM
    assert (stop.requested, stop.look()) == (True, True)
    for check in (stop.check, stop.check_on_all_ranks, stop.check):
        with pytest.raises(Stopped):
            check()


def test_looks_are_counted_by_what_tests_stop_with():
    stop = StopAfter(looks=2)
    stop.check()
    stop.check_on_all_ranks()
    with pytest.raises(Stopped):
        stop.check()
    assert stop.signal_number == signal.SIGTERM
