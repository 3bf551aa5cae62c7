"""The top of the page: one answer to each critic, its tiles of figures, and the table that compares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from critic_train.evaluation import metrics
from critic_train.evaluation.metrics import Metric
from critic_train.evaluation.summary_text import sign
from critic_train.report.compared_critics import PageCritic, baselines_of, table_of
from critic_train.report.provenance import show_command
from critic_train.report.report_sources import Cell, Record
from critic_train.report.verdict_model import (
    MAIN,
    MEAN_RETURN,
    MEAN_VALUE,
    ROLLOUTS,
    TOKENS,
    baseline_differences,
    counts,
    critic_differences,
    metric_column,
    return_figures,
    text_column,
)
from critic_train.text import interval

OVER = {"group_mean": "over GRPO's baseline", "stored": "over the stored values"}
"""A baseline -> the name of the tile that compares a critic with it."""


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
        answer=answer(critic.metrics),
        progress=progress(critic),
        tiles=tiles(critic.metrics),
        counts=facts(critic.verdict),
    )


def answer(critic: Record) -> Answer:
    """The verdict in a line, by the intervals, never by the figures alone."""
    if not critic:
        return Answer("unknown", "Not judged yet: there is no evaluation on held-out rollouts.")
    against_constant = sign(critic.get("explained_variance_interval"))
    against_group = sign(critic.part("explained_variance_minus").part("group_mean").get("interval"))
    if critic.get(MAIN) is None:
        return Answer("unknown", "Cannot tell: the returns do not vary.")
    if against_constant is None:
        return Answer("unknown", "Cannot tell: one prompt group is too few for an interval.")
    if against_constant < 0:
        return Answer("no", "No: PPO would do better with a constant in its place.")
    if against_constant == 0:
        return Answer("no", "Not yet: it is not shown to be better than a constant.")
    if against_group is None:
        return Answer("yes", "Yes: it is better than a constant.")
    if against_group > 0:
        return Answer("yes", "Yes: it lowers the variance of advantages by more than GRPO's baseline would.")
    if against_group < 0:
        return Answer("partly", "Better than a constant, but GRPO's baseline would do more.")
    return Answer("partly", "Better than a constant; not shown to be better than GRPO's baseline.")


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


def tiles(critic: Record) -> list[Tile]:
    """The figures that exist, the most telling first."""
    shown = sorted((metric for metric in metrics.METRICS if metric.tile), key=lambda metric: metric.tile)
    shown = [metric for metric in shown if critic.get(metric.name) is not None]
    made = [_tile(critic, metric) for metric in shown if metric.topic != "errors"]
    monte_carlo = critic.part("monte_carlo")
    if monte_carlo.get(MAIN) is not None and _differs(monte_carlo, critic, MAIN):
        bounds = monte_carlo.bounds(f"{MAIN}_interval")
        made.append(
            Tile("against Monte-Carlo returns", monte_carlo.cell(MAIN), bounds, "no critic's values in the target")
        )
    for difference in sorted(baseline_differences(critic), key=lambda difference: difference.other == "stored"):
        name = OVER[difference.other]
        tile = Tile(name, difference.difference, difference.interval, "difference, paired by prompt")
        made.insert(min(2, len(made)), tile)
    return made + [_tile(critic, metric) for metric in shown if metric.topic == "errors"]


def _tile(critic: Record, metric: Metric) -> Tile:
    bounds = critic.bounds(f"{metric.name}_interval") if metric.has_interval else Cell("")
    return Tile(metric.tile_name or metric.label, critic.cell(metric.name, metric.format), bounds, metric.about)


def facts(verdict: Record) -> list[tuple[str, Cell]]:
    """What was judged on: counts, and the figures of the returns."""
    names = {"mean": "mean return", "std": "its deviation", "min": "least", "max": "greatest"}
    return counts(verdict) + [(names[key], cell) for key, cell in return_figures(verdict).items() if cell.at]


def comparison(critics: Sequence[PageCritic]) -> list[list[Any]]:
    """One column a critic and a baseline; headings first. Figures that no critic or baseline has are left out."""
    columns = [(critic.name, critic.metrics) for critic in critics if critic.metrics]
    if not columns:
        return []
    columns += [(name, record) for name, _, record in baselines_of(critics)]
    lines: list[tuple[str, str, Callable[[Any], str]]] = []
    for metric in metrics.metrics_of():
        if metric.page != "no":
            lines.append((metric.label, metric.name, metric.format))
        if metric.page == "with interval":
            lines.append(("95 % interval", f"{metric.name}_interval", interval))
    rows: list[list[Any]] = [["", *(name for name, _ in columns)]]
    for label, key, how in lines:
        if any(record.get(key) is not None for _, record in columns):
            rows.append([label, *(record.cell(key, how) for _, record in columns)])
    return rows


def differences(critics: Sequence[PageCritic]) -> list[list[Any]]:
    """By how much the critics of one evaluation differ from each other, paired by prompt group."""
    verdicts = {id(critic.verdict.data): critic.verdict for critic in critics}.values()
    rows = [
        [difference.other, difference.metric, difference.difference, difference.interval]
        for verdict in verdicts
        for difference in critic_differences(verdict)
    ]
    return [["", "figure", "difference", "95 % interval"], *rows] if rows else []


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
