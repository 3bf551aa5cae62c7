"""The critics that a page speaks of, each with its figures, its colour and the run it comes from.

What the charts and tables of several critics have in common.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from critic_train.evaluation.summary_text import summary_text
from critic_train.report.report_sources import Record, Source, short_names, titles
from critic_train.report.svg_charts import SERIES, Key

BASELINES = {"constant": "constant mean", "stored": "stored values", "group_mean": "prompt group's mean"}
INK_OF = {"constant": "constant", "stored": "stored", "group_mean": "group-mean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A critic on the page.

    Attributes:
        name: what it is called on the page.
        key: what it is called in its verdict.
        number: its place on the page, from 1.
        source: where it was read.
        metrics: its metrics; empty where it was never judged.
        baselines: what it has to beat, name -> metrics.
        verdict: the whole verdict, for the counts and the returns; empty for runs that never wrote it.
        words: the verdict in sentences.
        examples: rollouts to read.
    """

    name: str
    key: str
    number: int
    source: Source
    metrics: Record
    baselines: Record
    verdict: Record
    words: Sequence[str] = ()
    examples: Sequence[Record] = field(default_factory=list)

    @property
    def ink(self) -> str:
        """Its colour, one of drawing.INKS."""
        return f"series-{(self.number - 1) % SERIES + 1}"

    def judged(self) -> "dict[str, Record]":
        """The baselines that were judged beside it, those that it is itself left out."""
        names = [name for name in BASELINES if name in self.baselines.data]
        return {name: self.baselines.part(name) for name in names if name != self.key}


def subjects_of(sources: Sequence[Source]) -> list[Subject]:
    """Every critic of every source, in order."""
    found: list[Subject] = []
    for source, label in zip(sources, titles(sources), strict=True):
        if source.is_run:
            found.append(_of_run(source, label, len(found) + 1))
        else:
            found += _of_evaluation(source, len(found) + 1)
    return found


def data_sets(subjects: Sequence[Subject]) -> list[list[Subject]]:
    """The subjects that were judged on the same rollouts, together: those whose returns have the same figures."""
    found: dict[str, list[Subject]] = {}
    for subject in subjects:
        if subject.metrics:
            verdict = subject.verdict
            told = [verdict.get("rollouts"), verdict.get("response_tokens"), dict(verdict.part("returns").data)]
            constant = subject.baselines.part("constant").get("mse")
            found.setdefault(repr([*told, constant]), []).append(subject)
    return list(found.values())


def baselines_of(subjects: Sequence[Subject]) -> list[tuple[str, str, Record]]:
    """What the subjects have to beat, once for each set of rollouts: (name on the page, key, metrics)."""
    sets = data_sets(subjects)
    return [
        (BASELINES[name] + (f" ({among[0].name})" if len(sets) > 1 else ""), name, metrics)
        for among in sets
        for name, metrics in among[0].judged().items()
    ]


def _of_run(source: Source, label: str, number: int) -> Subject:
    verdict, key = source.evaluation, "critic"
    if verdict:
        key = next(iter(verdict.part("critics").data), key)
        metrics, baselines = verdict.part("critics").part(key), verdict.part("baselines")
        words = verdict.get("words") or []
    else:
        metrics = _best(source)
        baselines, words = metrics.part("baselines"), _words(metrics)
    return Subject(
        name=label,
        key=key,
        number=number,
        source=source,
        metrics=metrics,
        baselines=baselines,
        verdict=verdict,
        words=words,
        examples=verdict.rows("examples"),
    )


def _of_evaluation(source: Source, first: int) -> list[Subject]:
    verdict = source.evaluation
    names = list(verdict.part("critics").parts())
    every = verdict.get("words") or []
    shown = short_names(names)
    found = []
    for number, (name, short) in enumerate(zip(names, shown, strict=True), start=first):
        start = f"{name}: "
        own = [words.removeprefix(start) for words in every if len(names) == 1 or words.startswith(start)]
        examples = [row for row in verdict.rows("examples") if row.get("critic") in (name, None)]
        found.append(
            Subject(
                name=BASELINES.get(name, short),
                key=name,
                number=number,
                source=source,
                metrics=verdict.part("critics").part(name),
                baselines=verdict.part("baselines"),
                verdict=verdict,
                words=own,
                examples=examples,
            )
        )
    return found


def _best(source: Source) -> Record:
    """The evaluation of a run that its result speaks of: the best, else the last."""
    step = source.result.get("best_step")
    at_best = [record for record in source.evaluations if record.get("step") == step]
    return (at_best or source.evaluations or [Record({}, "")])[-1]


def _words(metrics: Record) -> list[str]:
    """The verdict in words from what metrics.jsonl keeps of it."""
    if not metrics or not metrics.part("baselines"):
        return []
    several = metrics.get("explained_variance_interval") is not None
    stand_in: dict[str, Any] = {
        "critics": {"critic": dict(metrics.data)},
        "baselines": dict(metrics.part("baselines").data),
        "differences": {},
        # Not recorded there; the sentences only ask whether there are any, and several.
        "response_tokens": 1,
        "prompt_groups": 2 if several else 1,
        "rollouts": -1,
    }
    return summary_text(stand_in)


def with_rows(subjects: Sequence[Subject], table: str, *keys: str) -> list[tuple[Subject, list[Record]]]:
    """The critics that have such a table, with the rows of it in which every key has a figure."""
    found = []
    for subject in subjects:
        rows = [row for row in subject.metrics.rows(table) if all(row.get(key) is not None for key in keys)]
        if rows:
            found.append((subject, rows))
    return found


def keys_of(found: Sequence[tuple[Subject, Any]], alone: str = "") -> list[Key]:
    """A legend entry for each critic; none for one that is alone, unless it has a name for that."""
    if len(found) == 1:
        return [Key(text=alone, ink=found[0][0].ink)] if alone else []
    return [Key(text=subject.name, ink=subject.ink) for subject, _ in found]


def heading(subject: Subject, among: Sequence[Any], columns: int) -> list[list[str]]:
    """The row that begins a critic's part of a table, where there are several."""
    return [[subject.name] + [""] * (columns - 1)] if len(among) > 1 else []


def table_of(
    found: Sequence[tuple[Subject, list[Record]]], titles: Sequence[str], cells: Callable[[Record], list[Any]]
) -> list[list[Any]]:
    """A table below its titles: the cells of every critic's rows, below its name where there are several."""
    table: list[list[Any]] = [list(titles)]
    for subject, rows in found:
        table += heading(subject, found, len(titles)) + [cells(row) for row in rows]
    return table


def per_cent(row: Record) -> str:
    """The part of the response that a row speaks of."""
    return f"{100 * row.get('from'):.0f} to {100 * row.get('to'):.0f} %"


def middles(rows: Sequence[Record]) -> list[float]:
    """Of parts of the response, in per cent."""
    return [50 * (row.get("from") + row.get("to")) for row in rows]
