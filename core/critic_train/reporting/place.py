"""Where a page goes."""

from collections.abc import Sequence
from pathlib import Path

from critic_train.errors import ConfigError
from critic_train.reporting.sources import Source

PAGE = "report.html"


def default_place(sources: Sequence[Source]) -> Path:
    """In the run, beside an evaluation's file, or here where there are several."""
    [first, *others] = sources
    if others or first.path is None:
        return Path(PAGE)
    return first.path / PAGE if first.is_run else first.path.with_suffix(".html")


def refuse_place(path: Path, flag: str) -> None:
    """Say at once where a page cannot go.

    Raises:
        ConfigError: it is a folder, or its folder is missing.
    """
    if path.is_dir():
        raise ConfigError(f"{flag}: {path} is a folder", hint=f"name a file in it, as in {path / PAGE}")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag}: no folder {path.parent}", hint="make it first, or name another place")
