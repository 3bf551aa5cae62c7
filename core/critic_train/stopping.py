"""How a long job is asked to stop: a flag that is looked at between micro-batches and row batches."""

from dataclasses import dataclass


@dataclass(slots=True)
class StopRequest:
    """Set from a signal handler, read by the job.

    Attributes:
        signal_number: the signal that asked for the stop, or None while nobody has.
    """

    signal_number: int | None = None

    @property
    def requested(self) -> bool:
        """Whether somebody has asked the job to stop."""
        return self.signal_number is not None

    def look(self) -> bool:
        """Whether to stop here. Several ranks look together, at the same places, and get the same answer."""
        return self.requested
