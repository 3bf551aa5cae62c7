"""Show a run's events to observers, and keep their failures away from the run."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from critic_train.errors import first_line
from critic_train.events import Event, Notice


class Observer(Protocol):
    """Somebody who is shown every event of a run, in order.

    Attributes:
        name: what a failure is told under, as in "wandb".
    """

    name: str

    def take(self, event: Event) -> None:
        """Look at the next event. Whatever is raised ends this observer, never the run."""

    def close(self) -> None:
        """The run is over, or stopped, or has failed; called once, also where `take` has raised."""


def observed(events: Iterator[Event], observers: Sequence[Observer]) -> Iterator[Event]:
    """Pass events on, each shown to the observers first.

    An observer that raises is told of in one warning, and shown nothing more.

    Args:
        events: of a run.
        observers: in the order in which they look.
    """
    watching = list(observers)
    try:
        for event in events:
            for observer in list(watching):
                failure = _failure(observer, lambda observer=observer, event=event: observer.take(event))  # type: ignore[misc]
                if failure is not None:
                    watching.remove(observer)
                    _failure(observer, observer.close)
                    yield failure
            yield event
    finally:
        failures = [_failure(observer, observer.close) for observer in watching]
    yield from (failure for failure in failures if failure is not None)


def _failure(observer: Observer, act: Callable[[], None]) -> Notice | None:
    """What went wrong while an observer acted, as a warning."""
    try:
        act()
    except Exception as error:
        reason = first_line(error)
        return Notice(
            message=f"{observer.name} failed and gets nothing more of this run: {reason}; metrics.jsonl has everything",
            level="warning",
        )
    return None
