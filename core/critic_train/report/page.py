"""`critic-train report`: read runs and evaluations, render one HTML page, write it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from critic_train import __version__
from critic_train.errors import ConfigError, MachineError
from critic_train.report.compared_critics import PageCritic, critics_of, data_sets
from critic_train.report.curve_charts import curves
from critic_train.report.provenance import different_settings, provenance_of
from critic_train.report.report_sources import Cell, Source, check_page_path, default_page_path, read_sources, titles
from critic_train.report.rollout_pages import (
    SHADES,
    TOKENS_ON_A_PAGE,
    Reading,
    decoder_of,
    extreme_of,
    readings,
    scale_of,
)
from critic_train.report.svg_charts import Key
from critic_train.report.verdict_charts import verdict_charts, where_charts
from critic_train.report.verdict_page import card, comparison, differences, groups, with_short_names
from critic_train.run.storage import replace_file
from critic_train.settings import ReportSettings

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSection:
    """A critic's rollouts to read.

    Attributes:
        critic: the critic.
        readings: the rollouts.
        keys: legend of their charts.
        extreme: the value with the deepest shade.
        has_text: whether there is a tokenizer; else tokens are numbers.
    """

    critic: PageCritic
    readings: Sequence[Reading]
    keys: Sequence[Key]
    extreme: Cell
    has_text: bool


def render(sources: Sequence[Source], *, tokenizer: str | None = None) -> str:
    """The page as HTML text: complete in itself, no script, no network. The same sources give the same page.

    Args:
        sources: runs and evaluations, at least one.
        tokenizer: a directory with a tokenizer.json, where the sources have none of their own.
    """
    critics = critics_of(sources)
    examples = _example_sections(critics, tokenizer)
    judged = [critic for critic in critics if critic.metrics]
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            version=__version__,
            title=", ".join(titles(sources)),
            several=len(critics) > 1,
            cards=[card(critic) for critic in critics],
            verdicts=verdict_charts(judged),
            comparison=comparison(critics),
            differences=differences(critics),
            between=[with_short_names(sentence, critics) for sentence in _between(sources)],
            mixed=len(data_sets(critics)) > 1,
            curves=curves(critics),
            where=where_charts(judged),
            groups=[(critic, tables) for critic in critics if (tables := groups(critic))],
            examples=examples,
            shades=SHADES,
            sources=[provenance_of(source) for source in sources],
            labels=titles([source for source in sources if source.is_run]),
            different=different_settings(sources),
        )
    )


def write_page(path: Path, sources: Sequence[Source], *, tokenizer: str | None = None) -> int:
    """Render the page and write it atomically.

    Returns:
        Its size in bytes.

    Raises:
        MachineError: there is no room or no permission; an older page stands unchanged.
    """
    content = render(sources, tokenizer=tokenizer).encode("utf-8", errors="replace")
    try:
        replace_file(path, content)
    except OSError as error:
        raise MachineError(
            f"the page {path} cannot be written: {error.strerror}", hint="free some space, or name another place"
        ) from error
    return len(content)


def _between(sources: Sequence[Source]) -> list[str]:
    """Sentences of the verdicts that are about several critics at once."""
    sentences: list[str] = []
    for source in sources:
        names = list(source.evaluation.part("critics").data)
        if len(names) > 1:
            about_one = tuple(f"{name}: " for name in names)
            every: list[str] = source.evaluation.get("words") or []
            sentences += [sentence for sentence in every if not sentence.startswith(about_one)]
    return sentences


def _example_sections(critics: Sequence[PageCritic], tokenizer: str | None) -> list[PageSection]:
    sections = []
    with_examples = [critic for critic in critics if critic.examples]
    for critic in with_examples:
        decode = decoder_of(critic.source, tokenizer)
        scale = scale_of(critic.examples, _mean_value(critic))
        shown = readings(critic, decode, scale, TOKENS_ON_A_PAGE // len(with_examples))
        if shown:
            keys = [Key(text="value", colour=critic.colour), Key(text="return", colour="group-mean")]
            if any(reading.has_old_values for reading in shown):
                keys.append(Key(text="old value", colour="stored", mark="stored"))
            extreme = extreme_of(critic.examples, scale)
            sections.append(
                PageSection(critic=critic, readings=shown, keys=keys, extreme=extreme, has_text=decode is not None)
            )
    return sections


def _mean_value(critic: PageCritic) -> float | None:
    """Of all tokens it was judged on."""
    mean_return, bias = critic.verdict.part("returns").get("mean"), critic.metrics.get("bias")
    return None if mean_return is None or bias is None else float(mean_return + bias)


def _environment() -> "Environment":
    """Jinja with everything from data escaped; drawings are the only markup that is let through."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("critic_train.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = Markup
    environment.tests["cell"] = lambda value: hasattr(value, "at")
    return environment


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
    if settings.page.tokenizer is not None and not _has_tokenizer(Path(settings.page.tokenizer)):
        raise ConfigError(
            f"--tokenizer: no tokenizer.json in {settings.page.tokenizer}",
            hint="give the directory of a model that has one",
        )
    sources = read_sources(settings.page.runs)
    path = Path(settings.page.to) if settings.page.to else default_page_path(sources)
    check_page_path(path, "--to")
    try:
        size = write_page(path, sources, tokenizer=settings.page.tokenizer)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{', '.join(settings.page.runs)}: not as fit and eval write it ({type(error).__name__}: {error})",
            hint="report what fit or eval --json wrote, unchanged; --debug shows where it stopped",
        ) from error
    return Report(path=path, size_bytes=size, sources=sources)


def _has_tokenizer(path: Path) -> bool:
    return path.is_file() or (path / "tokenizer.json").is_file()
