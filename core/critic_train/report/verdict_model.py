"""A verdict prepared for drawing: names, columns, differences and the series of charts.

The terminal and the page draw the same objects: the terminal lays them out in characters, the page in HTML and SVG.
Which metrics there are, and how each is written, follows from `evaluation.metrics`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from critic_train.evaluation import metrics
from critic_train.evaluation.metrics import Metric, Topic
from critic_train.report.report_sources import Cell, Record
from critic_train.text import DASH, count, fixed, interval, number, short, with_interval

BASELINES = {
    "constant": "constant mean",
    "stored": "stored values",
    "group_mean": "prompt group's mean",
    "fused": "fused with that mean",
}
"""A baseline's key in the verdict -> what it is called."""

FUSED = "fused"
MAIN = "explained_variance"
WITHIN = "explained_variance_within_group"
AUC_WITHIN = "auc_within_group"

COMPARISON: tuple[tuple[Topic, ...], ...] = (("explained", "correlation"), ("errors", "loss"))
"""Topics of the metrics that all predictions are compared by, in one wide table or in these two."""
POLICY: tuple[Topic, ...] = ("outcomes", "advantages", "calibration")
"""Topics of the metrics that say what a critic is worth to the policy that trains with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table.

    Attributes:
        label: its name in one line.
        heading: the same in a narrow column, with line breaks.
        cell: a row's record -> what the column shows of it.
        optional: whether it is left out where no row has a figure.
    """

    label: str
    heading: str
    cell: Callable[[Record], Cell]
    optional: bool = False

    def is_empty(self, rows: Sequence[Record]) -> bool:
        """Whether no row has a figure."""
        return all(self.cell(row).text == DASH for row in rows)


def _plain_column(key: str, label: str, how: Callable[[Any], str], heading: str = "") -> Column:
    return Column(label=label, heading=heading or label, cell=lambda row: row.cell(key, how))


def text_column(label: str, text: Callable[[Record], str]) -> Column:
    """A column that names the row, by a text of its own."""
    return Column(label=label, heading=label, cell=lambda row: Cell(text(row)))


ROLLOUTS = _plain_column("rollouts", "rollouts", count)
TOKENS = _plain_column("tokens", "tokens", count)
PAIRS = _plain_column("pairs", "pairs", count)
MEAN_RETURN = _plain_column("mean_return", "mean return", fixed, "mean\nreturn")
MEAN_VALUE = _plain_column("mean_value", "mean value", fixed, "mean\nvalue")
INTERVAL = _plain_column("interval", "95 % interval", interval)


def metric_column(metric: Metric, *, narrow: bool = False) -> Column:
    """The column of a metric without its interval; `narrow` where there are many columns."""
    return Column(
        label=metric.label,
        heading=(narrow and metric.narrow_heading) or _heading(metric),
        cell=lambda row: row.cell(metric.name, metric.format),
        optional=bool(metric.needs),
    )


def table_columns(table: metrics.Table) -> list[Column]:
    """The columns of the metrics that a table has, explained variance first."""
    return [metric_column(metric, narrow=True) for metric in metrics.metrics_of() if table in metric.tables]


def terminal_columns(topics: Sequence[Topic]) -> list[Column]:
    """The columns of the metrics of some topics that the terminal shows, with intervals as each metric says."""
    return [
        Column(label=metric.label, heading=_heading(metric), cell=_terminal_cell(metric))
        for metric in metrics.metrics_of(*topics)
        if metric.terminal != "no"
    ]


def policy_columns() -> list[Column]:
    """What a critic is worth to a policy, explained variance against Monte-Carlo returns last."""

    def against_monte_carlo(row: Record) -> Cell:
        part = row.part("monte_carlo")
        return Cell(with_interval(part.get(MAIN), part.get(f"{MAIN}_interval")))

    last = Column(
        label="explained variance, Monte Carlo",
        heading="explained variance,\nMonte Carlo",
        cell=against_monte_carlo,
    )
    return [*terminal_columns(POLICY), last]


def _heading(metric: Metric) -> str:
    return metric.heading or "\n".join(metric.label.rsplit(" ", 1))


def _terminal_cell(metric: Metric) -> Callable[[Record], Cell]:
    def cell(row: Record) -> Cell:
        if metric.terminal == "figure":
            return row.cell(metric.name, metric.format)
        write = metric.terminal_text or with_interval
        return Cell(write(row.get(metric.name), row.get(f"{metric.name}_interval")))

    return cell


def shown_name(name: str) -> str:
    """What a critic or a baseline is called."""
    return BASELINES.get(name, name)


def exists(metrics: Record) -> bool:
    """Whether a baseline exists: there is no group's mean of one rollout, and nothing to fuse with."""
    return metrics.get("mse") is not None or metrics.get(MAIN) is not None


def predictions_of(verdict: Record) -> list[tuple[str, Record]]:
    """Critics, then baselines, each with its metrics. Stored values that are judged are no baseline as well.

    With several critics each has a fused baseline of its own.
    """
    critics, baselines = verdict.part("critics").parts(), verdict.part("baselines").parts()
    named = [(shown_name(name), part) for name, part in critics.items()]
    for name, part in baselines.items():
        if name in critics or not exists(part):
            continue
        if name != FUSED or len(critics) < 2:
            named.append((shown_name(name), part))
            continue
        fused = [(critic, metrics.part(FUSED)) for critic, metrics in critics.items()]
        named += [(fused_name(shown_name(critic)), part) for critic, part in fused if exists(part)]
    return named


def fused_name(critic: str) -> str:
    """What the fused baseline of one of several critics is called."""
    return f"{critic}, fused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """By how much a figure differs, paired by prompt group.

    Attributes:
        other: what is subtracted: a baseline's key, or for two critics both, as in `a - b`.
        metric: label of the figure.
        is_main: whether the figure is explained variance.
        difference: with its sign.
        interval: of the difference.
    """

    other: str
    metric: str
    is_main: bool
    difference: Cell
    interval: Cell


def _difference(other: str, name: str, record: Record) -> Iterator[Difference]:
    if number(record.get("difference")) is not None:
        yield Difference(
            other=other,
            metric=next((m.label for m in metrics.METRICS if m.name == name), name),
            is_main=name == MAIN,
            difference=record.cell("difference", lambda value: f"{value:+.3f}"),
            interval=record.bounds("interval"),
        )


def baseline_differences(critic: Record) -> list[Difference]:
    """Explained variance of a critic, or of a fused baseline, less that of the baselines."""
    parts = critic.part("explained_variance_minus").parts()
    return [difference for name, record in parts.items() for difference in _difference(name, MAIN, record)]


def critic_differences(verdict: Record) -> list[Difference]:
    """Each pair of critics: explained variance, then the other metrics that critics are compared by."""
    return [
        difference
        for pair, part in verdict.part("differences").parts().items()
        for name, record in {MAIN: part, **part.parts()}.items()
        for difference in _difference(pair, name, record)
    ]


def between_prompts(verdict: Record) -> tuple[Cell, Cell] | None:
    """The share of the outcomes' variance between prompts, and its interval; None where it is not known."""
    if number(verdict.get("between_prompt_share")) is None:
        return None
    return verdict.cell("between_prompt_share"), verdict.bounds("between_prompt_share_interval")


def counts(verdict: Record) -> list[tuple[str, Cell]]:
    """Rollouts, prompt groups and response tokens that were judged on."""
    return [
        (key.replace("_", " "), verdict.cell(key, lambda value: f"{value:,}"))
        for key in ("rollouts", "prompt_groups", "response_tokens")
        if isinstance(verdict.get(key), int)
    ]


def return_figures(verdict: Record) -> dict[str, Cell]:
    """mean, std, min and max of the returns that were judged on; empty where they are not recorded."""
    returns = verdict.part("returns")
    return {key: returns.cell(key, short) for key in ("mean", "std", "min", "max")} if returns else {}


@dataclass(frozen=True, slots=True)
class Series:
    """The points of one line of a chart.

    Attributes:
        rows: the record of each point.
        x: where each stands.
        y: its figure.
        intervals: [low, high] of each figure, or None.
    """

    rows: Sequence[Record]
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[Sequence[float] | None]

    def __bool__(self) -> bool:
        return bool(self.rows)


def _series(rows: Sequence[Record], x: Callable[[Record], float | None], y: str, bounds: str = "interval") -> Series:
    """Those of the rows that have both coordinates."""
    points = [(row, at) for row in rows if number(row.get(y)) is not None and (at := x(row)) is not None]
    shown = [row for row, _ in points]
    intervals = [row.get(bounds) or None for row in shown]
    return Series(shown, [at for _, at in points], [row.get(y) for row in shown], intervals)


def calibration_series(critic: Record) -> Series:
    """Mean return against mean value of the tokens in each bin of values."""
    return _series(critic.rows("calibration"), lambda row: number(row.get("mean_value")), "mean_return")


def position_series(prediction: Record) -> Series:
    """Explained variance along the response, in per cent of it."""
    return _series(prediction.rows("by_position"), middle_of_part, MAIN)


def auc_series(critic: Record) -> Series:
    """AUC within prompts along the response, in per cent of it."""
    return _series(critic.rows("auc_by_position"), middle_of_part, AUC_WITHIN)


def worth_series(critic: Record, which: str) -> Series:
    """Variance of the advantages by the rollouts a prompt, with GRPO's baseline or with the fused one.

    Args:
        critic: the metrics of a critic.
        which: "group_mean" or "fused".
    """
    rows = critic.part("worth").rows("by_rollouts")
    points = [(row.get("rollouts"), row.part(which)) for row in rows]
    shown = [(k, part) for k, part in points if number(part.get("advantage_variance")) is not None]
    return Series(
        [part for _, part in shown],
        [k for k, _ in shown],
        [part.get("advantage_variance") for _, part in shown],
        [part.get("advantage_variance_interval") or None for _, part in shown],
    )


def length_series(critic: Record) -> Series:
    """Explained variance by the tokens of the response."""
    return _series(critic.rows("by_length"), lambda row: (row.get("from") + row.get("to")) / 2, MAIN)


def evaluation_series(evaluations: Sequence[Record], metric: str) -> Series:
    """A metric of a run's critic at each evaluation, by step."""
    return _series(evaluations, lambda row: row.get("step"), metric, f"{metric}_interval")


def baseline_series(evaluations: Sequence[Record], metric: str, baseline: str) -> Series:
    """The same of a baseline at these evaluations."""
    parts = [(row.get("step"), row.part("baselines").part(baseline)) for row in evaluations]
    points = [(step, part) for step, part in parts if number(part.get(metric)) is not None]
    rows = [part for _, part in points]
    return Series(rows, [step for step, _ in points], [part.get(metric) for part in rows], [None] * len(rows))


def middle_of_part(row: Record) -> float:
    """The middle of a part of the response, in per cent."""
    return float(50 * (row.get("from") + row.get("to")))


def part_of_response(row: Record) -> str:
    """The part of the response that a row is about: `0 to 10 %`."""
    return f"{100 * row.get('from'):.0f} to {100 * row.get('to'):.0f} %"


def label_rows(prediction: Record, column: str) -> dict[str, Record]:
    """The values of a --by column, those with the most tokens first, each with its metrics."""
    rows = prediction.part("by").part(column).parts()
    return dict(sorted(rows.items(), key=lambda item: -(item[1].get("tokens") or 0)))
