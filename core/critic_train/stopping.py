"""How a long job is asked to stop.

A signal handler sets a StopRequest; the job calls `check` between row batches and `check_on_all_ranks` between
micro-batches, either of which raises Stopped; each command catches it once, at its top.
"""

from dataclasses import dataclass


class Stopped(Exception):  # noqa: N818 - a request that was met, not an error
    """Raised where a job stops on request."""


@dataclass(slots=True)
class StopRequest:
    """Set from a signal handler, read by the job.

    Attributes:
        signal_number: the signal that asked for the stop, None before.
    """

    signal_number: int | None = None

    @property
    def requested(self) -> bool:
        """Whether the job was asked to stop."""
        return self.signal_number is not None

    def check(self) -> None:
        """Stop here if this process was asked to.

        Raises:
            Stopped: it was.
        """
        if self.requested:
            raise Stopped

    def check_on_all_ranks(self) -> None:
        """Stop here if any rank was asked to: all ranks call this at the same places, and all stop or none.

        Raises:
            Stopped: one was.
        """
        if self.look():
            raise Stopped

    def look(self) -> bool:
        """Whether to stop here. Several ranks look together, at the same places, and get the same answer."""
        return self.requested
