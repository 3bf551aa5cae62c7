"""The top of the page: one answer to each critic, its tiles of figures, and the table that compares."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from critic_train.evaluation import metrics
from critic_train.evaluation.metrics import Metric
from critic_train.evaluation.summary_text import sign, too_few
from critic_train.report.compared_critics import PageCritic, baselines_of, table_of
from critic_train.report.provenance import show_command
from critic_train.report.report_sources import Cell, Record
from critic_train.report.verdict_model import (
    COMPARISON,
    MAIN,
    MEAN_RETURN,
    MEAN_VALUE,
    ROLLOUTS,
    TOKENS,
    baseline_differences,
    between_prompts,
    counts,
    critic_differences,
    metric_column,
    return_figures,
    text_column,
)

OVER = {"group_mean": "over GRPO's baseline", "stored": "over the stored values"}
"""A baseline -> the name of the tile that compares a critic with it."""
FUSED_OVER = {"critic": "fused, over it alone", "group_mean": "fused, over GRPO's"}
"""The same for what is fused with a critic."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether PPO can start with this critic: `mark` is "yes", "partly", "no" or "unknown", `text` the sentence."""

    mark: str
    text: str


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure in large type."""

    name: str
    figure: Cell
    interval: Cell
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The top of the page for one critic.

    Attributes:
        critic: the critic.
        answer: the verdict in a line.
        progress: where its run stands, empty for an evaluation.
        tiles: its figures.
        counts: what it was judged on.
    """

    critic: PageCritic
    answer: Answer
    progress: str
    tiles: Sequence[Tile]
    counts: Sequence[tuple[str, Cell]] = field(default_factory=list)


def card(critic: PageCritic) -> Card:
    """The top of the page for a critic."""
    return Card(
        critic=critic,
        answer=answer(critic.metrics, critic.verdict),
        progress=progress(critic),
        tiles=tiles(critic.metrics, critic.verdict),
        counts=facts(critic.verdict),
    )


def answer(critic: Record, verdict: Record | None = None) -> Answer:
    """The verdict in a line, by the intervals, never by the figures alone.

    Args:
        critic: its metrics.
        verdict: the whole verdict; None where only the metrics are known.
    """
    if not critic:
        return Answer("unknown", "Not judged yet: there is no evaluation on held-out rollouts.")
    against_constant = sign(critic.get("explained_variance_interval"))
    against_group = sign(critic.part("explained_variance_minus").part("group_mean").get("interval"))
    if critic.get(MAIN) is None:
        return Answer("unknown", "Cannot tell: the returns do not vary.")
    if against_constant is None:
        groups = verdict.get("prompt_groups") if verdict else None
        return Answer("unknown", f"Cannot tell: {too_few(groups)}." if groups else "Cannot tell: too few prompts.")
    if against_constant < 0:
        return Answer("no", "No: PPO would do better with a constant in its place.")
    if against_constant == 0:
        return Answer("no", "Not yet: it is not shown to be better than a constant.")
    if against_group is None:
        compared = critic.part("explained_variance_minus").part("group_mean").get("difference") is not None
        more = (
            "Not shown to be better than GRPO's baseline." if compared else "With one rollout a prompt GRPO has none."
        )
        return Answer("yes", f"Yes: it is better than a constant. {more}")
    fused = critic.part("fused")
    than_critic = sign(fused.part("variance_reduction_minus").part("critic").get("interval"))
    mixed = than_critic == 1 and sign(fused.get("variance_reduction_interval")) == 1
    if against_group > 0:
        more = " Fused with it, by more still." if mixed else ""
        return Answer("yes", f"Yes: it lowers the variance of advantages by more than GRPO's baseline would.{more}")
    more = " Fused with it, it does better than either." if mixed else ""
    if against_group < 0:
        return Answer("partly", f"Better than a constant, but GRPO's baseline would do more.{more}")
    return Answer("partly", f"Better than a constant; not shown to be better than GRPO's baseline.{more}")


def progress(critic: PageCritic) -> str:
    """How far a run has come; empty for an evaluation."""
    source = critic.source
    if not source.is_run:
        return ""
    total = source.result.get("total_steps") or source.started.part("resolved").get("steps")
    last = source.steps[-1].get("step") if source.steps else 0
    judged = critic.verdict.get("step") if critic.verdict else critic.metrics.get("step")
    text = f"step {last} of {total}" if total else f"step {last}"
    return text + (f"; judged as of step {judged}" if judged is not None else "")


def tiles(critic: Record, verdict: Record | None = None) -> list[Tile]:
    """The figures that exist, the most telling first. Args as for `answer`."""
    shown = sorted((metric for metric in metrics.METRICS if metric.tile), key=lambda metric: metric.tile)
    shown = [metric for metric in shown if critic.get(metric.name) is not None]
    made = [_tile(critic, metric) for metric in shown if metric.topic != "errors"]
    monte_carlo = critic.part("monte_carlo")
    if monte_carlo.get(MAIN) is not None and _differs(monte_carlo, critic, MAIN):
        bounds = monte_carlo.bounds(f"{MAIN}_interval")
        made.append(
            Tile("against Monte-Carlo returns", monte_carlo.cell(MAIN), bounds, "no critic's values in the target")
        )
    differences = [(OVER, d) for d in baseline_differences(critic)]
    differences += [(FUSED_OVER, d) for d in baseline_differences(critic.part("fused"))]
    ordered = sorted(differences, key=lambda pair: (pair[0] is not FUSED_OVER, pair[1].other == "stored"))
    for names, difference in ordered:
        tile = Tile(names[difference.other], difference.difference, difference.interval, "difference, paired by prompt")
        made.insert(min(2, len(made)), tile)
    share = between_prompts(verdict) if verdict else None
    if share is not None:
        made.insert(min(1, len(made)), Tile("between prompts", *share, "the most the prompt alone explains"))
    return made + [_tile(critic, metric) for metric in shown if metric.topic == "errors"]


def _tile(critic: Record, metric: Metric) -> Tile:
    bounds = critic.cell(f"{metric.name}_interval", metric.interval_format) if metric.has_interval else Cell("")
    return Tile(metric.tile_name or metric.label, critic.cell(metric.name, metric.format), bounds, metric.about)


def facts(verdict: Record) -> list[tuple[str, Cell]]:
    """What was judged on: counts, and the figures of the returns."""
    names = {"mean": "mean return", "std": "its deviation", "min": "least", "max": "greatest"}
    return counts(verdict) + [(names[key], cell) for key, cell in return_figures(verdict).items() if cell.at]


def comparison(critics: Sequence[PageCritic]) -> list[list[list[Any]]]:
    """Every figure of critics and baselines, as tables, headings first; what none of them has is left out.

    One column a critic and a baseline where there are few; else one row, in a table for each of COMPARISON.
    """
    named = [(critic.name, critic.metrics) for critic in critics if critic.metrics]
    if not named:
        return []
    named += [(name, record) for name, _, record in baselines_of(critics)]
    shown = [metric for metric in metrics.metrics_of() if metric.page != "no"]
    shown = [metric for metric in shown if any(record.get(metric.name) is not None for _, record in named)]
    if len(named) <= COLUMNS:
        lines = [line for metric in shown for line in _lines(metric, named)]
        return [[["", *(name for name, _ in named)], *lines]]
    first = set(COMPARISON[0])
    parts = [[m for m in shown if m.topic in first], [m for m in shown if m.topic not in first]]
    tables = []
    for part in parts:
        lines = [line for metric in part for line in _lines(metric, named)]
        columns = [["", *(name for name, _ in named)], *lines]
        tables.append([[column[row] for column in columns] for row in range(len(named) + 1)])
    return [table for table in tables if len(table[0]) > 1]


COLUMNS = 5
"""Critics and baselines that have room beside each other."""


def _lines(metric: Metric, named: Sequence[tuple[str, Record]]) -> list[list[Any]]:
    """A metric's figures, its label first, and its intervals where the page shows them."""
    lines = [[metric.label, *(record.cell(metric.name, metric.format) for _, record in named)]]
    if metric.page == "with interval":
        lines.append(["95 % interval", *(record.bounds(f"{metric.name}_interval") for _, record in named)])
    return lines


def differences(critics: Sequence[PageCritic]) -> list[list[Any]]:
    """By how much the critics of one evaluation differ from each other, paired by prompt group."""
    verdicts = {id(critic.verdict.data): critic for critic in critics}.values()
    rows = [
        [with_short_names(difference.other, critics), difference.metric, difference.difference, difference.interval]
        for critic in verdicts
        for difference in critic_differences(critic.verdict)
    ]
    return [["", "figure", "difference", "95 % interval"], *rows] if rows else []


def with_short_names(text: str, critics: Sequence[PageCritic]) -> str:
    """A text with the critics of evaluations called as the page calls them."""
    names = {critic.key: critic.name for critic in critics if not critic.source.is_run}
    if not names:
        return text
    # The longest first: a name may be the beginning of another.
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(pattern, lambda match: names[match[0]], text)


def groups(critic: PageCritic) -> list[tuple[str, list[list[Any]], list[str]]]:
    """The prompt groups it does best and worst on: title, table, and the commands that show them in the terminal."""
    columns = [
        text_column("prompt group", lambda row: str(row.get("uid"))),
        ROLLOUTS,
        TOKENS,
        metric_column(metrics.metric_named("mse")),
        MEAN_VALUE,
        MEAN_RETURN,
    ]
    tables = []
    for key, title in (("worst", "Furthest off"), ("best", "Closest")):
        rows = critic.metrics.part("groups").rows(key)
        if rows:
            uids = [str(row.get("uid")) for row in rows if row.get("uid") is not None]
            commands = [command for uid in uids if (command := show_command(critic.source, critic.key, uid))]
            tables.append((title, table_of([(critic, rows)], columns), commands))
    return tables


def _differs(one: Record, other: Record, key: str) -> bool:
    """Whether two figures differ by more than rounding."""
    a, b = one.get(key), other.get(key)
    return b is None or abs(a - b) > 1e-9
