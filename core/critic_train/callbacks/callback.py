"""Pass a run's events to callbacks, which log or draw them and cannot end the run."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from critic_train.errors import first_line
from critic_train.events import Event, Notice


class Callback(Protocol):
    """Is given every event of a run, in order.

    Attributes:
        name: what a warning calls it, as in "wandb".
    """

    name: str

    def on_event(self, event: Event) -> None:
        """Handle the next event. An exception ends this callback, never the run."""

    def close(self) -> None:
        """The run is over, was stopped, or has failed. Called once, also after `on_event` has raised."""


def with_callbacks(events: Iterator[Event], callbacks: Sequence[Callback]) -> Iterator[Event]:
    """Yield a run's events, each after the callbacks were given it.

    A callback that raises is closed and given nothing more; a warning says so.

    Args:
        events: of a run.
        callbacks: called in this order.
    """
    active = list(callbacks)
    try:
        for event in events:
            for callback in list(active):
                warning = _call(callback, lambda callback=callback, event=event: callback.on_event(event))  # type: ignore[misc]
                if warning is not None:
                    active.remove(callback)
                    _call(callback, callback.close)
                    yield warning
            yield event
    finally:
        warnings = [_call(callback, callback.close) for callback in active]
    yield from (warning for warning in warnings if warning is not None)


def _call(callback: Callback, method: Callable[[], None]) -> Notice | None:
    """Call a method of a callback; a warning where it raises."""
    try:
        method()
    except Exception as error:
        reason = first_line(error)
        return Notice(
            message=f"{callback.name} failed and gets nothing more of this run: {reason}; metrics.jsonl has everything",
            level="warning",
        )
    return None
