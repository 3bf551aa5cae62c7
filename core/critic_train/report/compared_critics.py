"""The critics that a page is about, each with its metrics, its colour and the run or evaluation it comes from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from critic_train.evaluation.summary_text import summary_text
from critic_train.report.report_sources import Record, Source, short_names, titles
from critic_train.report.svg_charts import SERIES, Key
from critic_train.report.verdict_model import BASELINES, FUSED, Column, Series, exists, fused_name, shown_name

BASELINE_COLOURS = {"constant": "constant", "stored": "stored", "group_mean": "group-mean", FUSED: "fused"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCritic:
    """A critic on the page.

    Attributes:
        name: what it is called on the page.
        key: what it is called in its verdict.
        number: its position on the page, from 1.
        source: where it was read.
        metrics: its metrics; empty where it was never judged.
        baselines: name -> metrics of the baselines that were judged beside it.
        verdict: the whole verdict, for the counts and the returns; empty for runs that never wrote it.
        sentences: the verdict as sentences.
        examples: rollouts to read.
    """

    name: str
    key: str
    number: int
    source: Source
    metrics: Record
    baselines: Record
    verdict: Record
    sentences: Sequence[str] = ()
    examples: Sequence[Record] = field(default_factory=list)

    @property
    def colour(self) -> str:
        """One of svg_charts.COLOURS."""
        return f"series-{(self.number - 1) % SERIES + 1}"

    def judged_baselines(self) -> "dict[str, Record]":
        """The baselines that were judged beside it, without the one that it is itself."""
        names = [name for name in BASELINES if exists(self.baselines.part(name)) and name != self.key]
        # The fused baseline of the verdict is its first critic's.
        if FUSED in names and self.baselines.part(FUSED).get("of") not in (None, self.key):
            names.remove(FUSED)
        return {name: self.baselines.part(name) for name in names}

    @property
    def fused(self) -> Record:
        """The metrics of what is fused with it; empty where nothing is."""
        return self.metrics.part(FUSED) if exists(self.metrics.part(FUSED)) else Record({}, "")


def critics_of(sources: Sequence[Source]) -> list[PageCritic]:
    """Every critic of every source, in order."""
    critics: list[PageCritic] = []
    for source, label in zip(sources, titles(sources), strict=True):
        if source.is_run:
            critics.append(_of_run(source, label, len(critics) + 1))
        else:
            critics += _of_evaluation(source, len(critics) + 1)
    return critics


def data_sets(critics: Sequence[PageCritic]) -> list[list[PageCritic]]:
    """The critics that were judged on the same rollouts, together: those whose returns have the same figures."""
    sets: dict[str, list[PageCritic]] = {}
    for critic in critics:
        if critic.metrics:
            verdict = critic.verdict
            figures = [verdict.get("rollouts"), verdict.get("response_tokens"), dict(verdict.part("returns").data)]
            constant = critic.baselines.part("constant").get("mse")
            sets.setdefault(repr([*figures, constant]), []).append(critic)
    return list(sets.values())


def baselines_of(critics: Sequence[PageCritic]) -> list[tuple[str, str, Record]]:
    """The baselines, once for each set of rollouts: (name on the page, key, metrics)."""
    sets = data_sets(critics)
    named = []
    for among in sets:
        of_set = f" ({among[0].name})" if len(sets) > 1 else ""
        baselines = among[0].judged_baselines()
        named += [(shown_name(name) + of_set, name, part) for name, part in baselines.items() if name != FUSED]
        for critic in among:
            name = fused_name(critic.name) if len(critics) > 1 else shown_name(FUSED)
            named += [(name, FUSED, critic.fused)] if critic.fused else []
    return named


def _of_run(source: Source, label: str, number: int) -> PageCritic:
    verdict, key = source.evaluation, "critic"
    if verdict:
        key = next(iter(verdict.part("critics").data), key)
        metrics, baselines = verdict.part("critics").part(key), verdict.part("baselines")
        sentences = verdict.get("words") or []
    else:
        metrics = _best_evaluation(source)
        baselines, sentences = metrics.part("baselines"), _sentences(metrics)
    return PageCritic(
        name=label,
        key=key,
        number=number,
        source=source,
        metrics=metrics,
        baselines=baselines,
        verdict=verdict,
        sentences=sentences,
        examples=verdict.rows("examples"),
    )


def _of_evaluation(source: Source, first: int) -> list[PageCritic]:
    verdict = source.evaluation
    names = list(verdict.part("critics").parts())
    sentences = verdict.get("words") or []
    critics = []
    for number, (name, short) in enumerate(zip(names, short_names(names), strict=True), start=first):
        start = f"{name}: "
        own = [sentence.removeprefix(start) for sentence in sentences if len(names) == 1 or sentence.startswith(start)]
        critics.append(
            PageCritic(
                name=BASELINES.get(name, short),
                key=name,
                number=number,
                source=source,
                metrics=verdict.part("critics").part(name),
                baselines=verdict.part("baselines"),
                verdict=verdict,
                sentences=own,
                examples=[row for row in verdict.rows("examples") if row.get("critic") in (name, None)],
            )
        )
    return critics


def _best_evaluation(source: Source) -> Record:
    """The evaluation of a run that its result is about: the best, else the last."""
    step = source.result.get("best_step")
    at_best = [record for record in source.evaluations if record.get("step") == step]
    return (at_best or source.evaluations or [Record({}, "")])[-1]


def _sentences(metrics: Record) -> list[str]:
    """The verdict as sentences, from what metrics.jsonl has of it."""
    if not metrics or not metrics.part("baselines"):
        return []
    several = metrics.get("explained_variance_interval") is not None
    stand_in: dict[str, Any] = {
        "critics": {"critic": dict(metrics.data)},
        "baselines": dict(metrics.part("baselines").data),
        "differences": {},
        # Where they were not recorded: the sentences only ask whether there are any, and several.
        "response_tokens": 1,
        "prompt_groups": metrics.get("prompt_groups") or (2 if several else 1),
        "rollouts": metrics.get("rollouts") or -1,
        **{name: metrics.get(name) for name in ("between_prompt_share", "between_prompt_share_interval")},
    }
    return summary_text(stand_in)


def with_series(
    critics: Sequence[PageCritic], series_of: Callable[[Record], Series]
) -> list[tuple[PageCritic, Series]]:
    """The critics that have points in a series, each with it."""
    pairs = [(critic, series_of(critic.metrics)) for critic in critics]
    return [(critic, series) for critic, series in pairs if series]


def legend(critics: Sequence[PageCritic], alone: str = "") -> list[Key]:
    """A legend entry for each critic; none for one that is alone, unless it has a name for that."""
    if len(critics) == 1:
        return [Key(text=alone, colour=critics[0].colour)] if alone else []
    return [Key(text=critic.name, colour=critic.colour) for critic in critics]


def baseline_key(name: str) -> Key:
    """The legend entry of a baseline."""
    return Key(text=BASELINES[name], colour=BASELINE_COLOURS[name], mark=BASELINE_COLOURS[name])


def table_of(critics: Sequence[tuple[PageCritic, Sequence[Record]]], columns: Sequence[Column]) -> list[list[Any]]:
    """A table, its headings first: the cells of every critic's rows, below its name where there are several."""
    table: list[list[Any]] = [[column.label for column in columns]]
    for critic, rows in critics:
        if len(critics) > 1:
            table.append([critic.name] + [""] * (len(columns) - 1))
        table += [[column.cell(row) for column in columns] for row in rows]
    return table
