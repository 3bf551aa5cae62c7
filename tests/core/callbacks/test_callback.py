"""Callbacks are given every event, and cannot end the run."""

import pytest

from critic_train.callbacks.callback import with_callbacks
from critic_train.events import Notice, Progress

EVENTS = [Progress(stage="reading", done=done, total=3) for done in range(4)]


class Watcher:
    def __init__(self, name: str = "watcher", *, fails_at: int | None = None, fails_to_close: bool = False) -> None:
        self.name = name
        self.seen: list[object] = []
        self.closed = 0
        self._fails_at, self._fails_to_close = fails_at, fails_to_close

    def on_event(self, event: object) -> None:
        if len(self.seen) == self._fails_at:
            raise ConnectionError("the server\nis away")
        self.seen.append(event)

    def close(self) -> None:
        self.closed += 1
        if self._fails_to_close:
            raise OSError("no room")


def test_every_event_is_shown_and_passed_on():
    first, second = Watcher(), Watcher()
    assert list(with_callbacks(iter(EVENTS), [first, second])) == EVENTS
    assert first.seen == second.seen == EVENTS
    assert first.closed == second.closed == 1


def test_one_that_fails_is_told_of_once_and_shown_nothing_more():
    broken, whole = Watcher("wandb", fails_at=2), Watcher()
    passed = list(with_callbacks(iter(EVENTS), [broken, whole]))
    told = [event for event in passed if isinstance(event, Notice)]
    assert [event for event in passed if not isinstance(event, Notice)] == EVENTS
    assert [(notice.level, "wandb failed" in notice.message) for notice in told] == [("warning", True)]
    assert "the server;" in told[0].message
    assert (broken.seen, broken.closed) == (EVENTS[:2], 1)
    assert whole.seen == EVENTS


def test_a_failure_to_close_is_only_a_warning():
    passed = list(with_callbacks(iter(EVENTS), [Watcher(fails_to_close=True)]))
    assert passed[:-1] == EVENTS
    assert "no room" in passed[-1].message


def test_callbacks_are_closed_when_the_run_fails():
    watcher = Watcher()

    def failing():
        yield EVENTS[0]
        raise RuntimeError("the run")

    with pytest.raises(RuntimeError, match="the run"):
        list(with_callbacks(failing(), [watcher]))
    assert (watcher.seen, watcher.closed) == (EVENTS[:1], 1)
