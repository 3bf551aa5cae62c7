"""A run's directory as the ranks see it that do not lead: they read what rank 0 has written, and write nothing."""

from pathlib import Path
from types import TracebackType
from typing import Any

from critic_train.run.directory import RunDirectory


class FollowedRun(RunDirectory):
    """A run directory that rank 0 holds. Its file system is one that all ranks see."""

    def __enter__(self) -> "FollowedRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Rank 0 does."""

    def start_afresh(self) -> None:
        """Rank 0 does."""

    def drop_cache(self) -> None:
        """Rank 0 does."""

    def open_logs(self, metrics_bytes: int) -> None:
        """Rank 0 does."""

    def log_metrics(self, record: dict[str, Any]) -> None:
        """Rank 0 does."""

    def log_timing(self, record: dict[str, Any]) -> None:
        """Rank 0 does."""

    def point_best_at(self, checkpoint: Path) -> None:
        """Rank 0 does."""
