"""`critic-train report`, from top to bottom: read runs and evaluations, write one page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from critic_train.errors import ConfigError
from critic_train.reporting.page import write_page
from critic_train.reporting.place import default_place, refuse_place
from critic_train.reporting.sources import Source, read_sources
from critic_train.settings import ReportSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A page that was written.

    Attributes:
        path: the page.
        size_bytes: its size.
        sources: what it is about.
    """

    path: Path
    size_bytes: int
    sources: Sequence[Source]


def report(settings: ReportSettings) -> Report:
    """Write the page of some runs and evaluations.

    Raises:
        ConfigError: one of them is no run and no evaluation, or the page cannot go where it should.
        MachineError: there is no room or no permission.
    """
    if settings.tokenizer is not None and not _has_tokenizer(Path(settings.tokenizer)):
        raise ConfigError(
            f"--tokenizer: no tokenizer.json in {settings.tokenizer}",
            hint="give the directory of a model that has one",
        )
    sources = read_sources(settings.runs)
    path = Path(settings.to) if settings.to else default_place(sources)
    refuse_place(path, "--to")
    try:
        size = write_page(path, sources, tokenizer=settings.tokenizer)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{', '.join(settings.runs)}: not as fit and eval write it ({type(error).__name__}: {error})",
            hint="report what fit or eval --json wrote, unchanged; --debug shows where it stopped",
        ) from error
    return Report(path=path, size_bytes=size, sources=sources)


def _has_tokenizer(path: Path) -> bool:
    return path.is_file() or (path / "tokenizer.json").is_file()
