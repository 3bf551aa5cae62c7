"""The metrics of a prediction, each declared once, in METRICS.

The JSON of `eval`, the tables and tiles of the terminal and the page, the trackers' names, the choices of --best-by,
the differences of critics and their intervals, and the names of gates follow from the list. A new metric is a function
of `metric_sums.Sums`, an entry of METRICS, a test, and a row of docs/reference/metrics.md. `evaluation.judge` has the
definition of each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from critic_train.evaluation.metric_sums import (
    Sums,
    advantage_variance,
    expected_calibration_error,
    explained_samples,
    explained_variance,
    explained_within_samples,
    mean_square,
    ratio_bounds,
    share_bounds,
    share_clipped,
    share_saturated,
    value_loss,
    variance_reduction,
    worth_bounds,
    worth_in_rollouts,
    worth_samples,
)
from critic_train.evaluation.moments import Floats
from critic_train.evaluation.resampling import Resampling
from critic_train.evaluation.worth import MOST
from critic_train.text import DASH, fixed, interval, number, percent, signed, three

Kind = Literal["values", "group_mean", "constant", "fused"]
"""What a prediction is: values (a critic's or the stored ones), or one of the other baselines."""

Topic = Literal["explained", "outcomes", "correlation", "errors", "calibration", "advantages", "loss"]
TOPICS: tuple[Topic, ...] = ("explained", "outcomes", "correlation", "errors", "calibration", "advantages", "loss")
"""The order in which metrics are shown; those of one topic stand in the order of METRICS."""

Better = Literal["higher", "lower", "near 0"]
Shown = Literal["no", "figure", "with interval"]
Table = Literal["by_position", "by_length", "by", "monte_carlo"]

EVERY: frozenset[Kind] = frozenset({"values", "group_mean", "constant", "fused"})
VALUES: frozenset[Kind] = frozenset({"values"})


Bounds = Callable[[Sums, Resampling, float, Floats], list[float] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure of a prediction.

    Attributes:
        name: its key in `eval --json`, in metrics.jsonl and in gates.
        label: what tables call it.
        topic: which metrics it stands beside.
        compute: its figure; None where it is not defined. Called where there are tokens.
        better: which way is good.
        needs: what has to be there besides returns, for the documentation; empty where nothing has.
        samples: its figure in each resample; None where nothing was resampled, or where it has no interval.
        interval: whether the interval is given, as `NAME_interval`.
        bounds: the interval, from the sums, the figure and the samples.
        kinds: the predictions that have it.
        tables: the tables that have a column of it.
        compared: whether the differences of critics have it.
        best_by: whether --best-by can name it; settings.training_sections.BestBy has the same names, as a test holds.
        tracker: its name in trackers, `val/NAME` by default.
        format, interval_format: the figure and its interval as text.
        terminal, page: whether the tables of the terminal and of the page show it.
        heading, narrow_heading: of its column in the terminal; by default the label, in two lines.
        terminal_text: figure and interval as the terminal's text, where `format` alone does not give it.
        tile: its place among the page's tiles, from 1; 0 for none.
        tile_name: what the tile calls it, by default the label.
        about: the small print of the tile.
    """

    name: str
    label: str
    topic: Topic
    compute: Callable[[Sums], float | None]
    better: Better
    needs: str = ""
    samples: Callable[[Sums], Floats | None] | None = None
    interval: bool = True
    bounds: "Bounds" = field(default=lambda sums, resampling, figure, samples: resampling.interval(figure, samples))
    kinds: frozenset[Kind] = EVERY
    tables: frozenset[Table] = frozenset()
    compared: bool = False
    best_by: bool = False
    tracker: str = ""
    format: Callable[[Any], str] = fixed
    interval_format: Callable[[Any], str] = field(default=lambda bounds: interval(bounds))
    terminal: Shown = "figure"
    page: Shown = "figure"
    heading: str = ""
    narrow_heading: str = ""
    terminal_text: Callable[[Any, Any], str] | None = None
    tile: int = 0
    tile_name: str = ""
    about: str = ""

    @property
    def has_interval(self) -> bool:
        """Whether `NAME_interval` stands beside it."""
        return self.samples is not None and self.interval

    def figure(self, sums: Sums) -> float | None:
        """Its figure, a plain number; None where it is not defined."""
        figure = self.compute(sums) if sums.tokens else None
        return None if figure is None else float(figure)


def _change_text(reduction: Any, bounds: Any) -> str:
    """A reduction as a change, so that less is negative: `-23 % [-31, -12]`."""
    share = number(reduction)
    if share is None:
        return DASH
    shown = f" [{-100 * bounds[1]:+.0f}, {-100 * bounds[0]:+.0f}]" if interval(bounds) else ""
    return f"{-100 * share:+.0f} %{shown}"


def group_size(rollouts: Any) -> str:
    """A number of rollouts a prompt: `3.6`, `24`; `1024+` where no group does as well."""
    finite = number(rollouts)
    if finite is None:
        return DASH
    if finite >= MOST:
        return f"{MOST}+"
    return f"{finite:.1f}" if finite < 10 else f"{finite:.0f}"


def _worth_interval(bounds: Any) -> str:
    """`[2.9, 6.1]`."""
    return f"[{group_size(bounds[0])}, {group_size(bounds[1])}]" if interval(bounds) else ""


def _worth_text(rollouts: Any, bounds: Any) -> str:
    """`3.6 [2.9, 6.1]`."""
    return f"{group_size(rollouts)} {_worth_interval(bounds)}".rstrip()


METRICS: tuple[Metric, ...] = (
    Metric(
        name="explained_variance",
        label="explained variance",
        topic="explained",
        compute=lambda sums: explained_variance(sums.error_squares, sums.target_squares),
        better="higher",
        samples=explained_samples,
        bounds=ratio_bounds,
        tables=frozenset({"by_position", "by_length", "by", "monte_carlo"}),
        best_by=True,
        tracker="critic/vf_explained_var",
        terminal="with interval",
        page="with interval",
        tile=1,
        about="0 a constant, 1 perfect",
    ),
    Metric(
        name="explained_variance_within_group",
        label="within prompts",
        topic="explained",
        compute=lambda sums: explained_variance(sums.error_within, sums.target_within),
        better="higher",
        samples=explained_within_samples,
        bounds=ratio_bounds,
        tables=frozenset({"by", "monte_carlo"}),
        compared=True,
        best_by=True,
        tracker="critic/vf_explained_var_within_group",
        page="with interval",
        tile=2,
        about="what it knows beyond the prompt",
    ),
    Metric(
        name="mse",
        label="MSE",
        topic="errors",
        compute=mean_square,
        better="lower",
        samples=lambda sums: None if sums.resampled is None else sums.resampled[0].mean_square,
        interval=False,
        tables=frozenset({"by_position", "by_length", "by", "monte_carlo"}),
        compared=True,
        best_by=True,
        format=three,
        tile=7,
        tile_name="mean squared error",
    ),
    Metric(
        name="mae",
        label="MAE",
        topic="errors",
        compute=lambda sums: None if sums.prediction is None else sums.prediction.absolute / sums.tokens,
        better="lower",
        format=three,
    ),
    Metric(
        name="bias",
        label="bias",
        topic="errors",
        compute=lambda sums: sums.error_mean,
        better="near 0",
        tables=frozenset({"by_position", "by_length", "by", "monte_carlo"}),
        format=signed,
        tile=8,
        about="values less returns",
    ),
    Metric(
        name="pearson",
        label="Pearson",
        topic="correlation",
        compute=lambda sums: None if sums.prediction is None else sums.prediction.pairs.correlation(),
        better="higher",
    ),
    Metric(
        name="spearman",
        label="Spearman",
        topic="correlation",
        compute=lambda sums: sums.spearman,
        better="higher",
    ),
    Metric(
        name="value_loss",
        label="value loss",
        topic="loss",
        compute=value_loss,
        better="lower",
        needs="stored values, unless the clip is off",
        best_by=True,
        format=three,
    ),
    Metric(
        name="clipfrac",
        label="clipfrac",
        topic="loss",
        compute=share_clipped,
        better="lower",
        needs="stored values and a clip",
        format=percent,
    ),
    Metric(
        name="saturation",
        label="saturation",
        topic="loss",
        compute=share_saturated,
        better="lower",
        needs="stored values and a clip",
        format=percent,
        terminal="no",
    ),
    Metric(
        name="expected_calibration_error",
        label="calibration error",
        topic="calibration",
        compute=expected_calibration_error,
        better="lower",
        kinds=VALUES,
        format=three,
        tile=6,
        about="mean distance of value and return",
    ),
    Metric(
        name="auc",
        label="AUC",
        topic="outcomes",
        compute=lambda sums: sums.discrimination.auc,
        better="higher",
        needs="two outcomes",
        samples=lambda sums: sums.discrimination.samples.get("auc"),
        bounds=share_bounds,
        kinds=VALUES,
        terminal="no",
        tile=4,
        about="over all rollouts",
    ),
    Metric(
        name="auc_within_group",
        label="AUC within prompts",
        topic="outcomes",
        compute=lambda sums: sums.discrimination.auc_within_group,
        better="higher",
        needs="two outcomes",
        samples=lambda sums: sums.discrimination.samples.get("auc_within_group"),
        bounds=share_bounds,
        kinds=VALUES,
        tables=frozenset({"by"}),
        compared=True,
        terminal="with interval",
        narrow_heading="AUC in\nprompts",
        tile=3,
        about="right above wrong, 0.5 a coin",
    ),
    Metric(
        name="tells_apart_from",
        label="right from wrong from",
        topic="outcomes",
        compute=lambda sums: sums.discrimination.tells_apart_from,
        better="lower",
        needs="two outcomes",
        kinds=VALUES,
        format=lambda share: percent(share, digits=0),
        page="no",
        heading="right from\nwrong from",
    ),
    Metric(
        name="advantage_variance",
        label="advantage variance",
        topic="advantages",
        compute=advantage_variance,
        better="lower",
        kinds=frozenset({"values", "group_mean", "fused"}),
        format=three,
        terminal="no",
    ),
    Metric(
        name="variance_reduction",
        label="variance reduction",
        topic="advantages",
        compute=variance_reduction,
        better="higher",
        needs="prompts with several rollouts",
        samples=lambda sums: explained_samples(sums.advantages),
        bounds=ratio_bounds,
        kinds=frozenset({"values", "fused"}),
        page="no",
        terminal="with interval",
        heading="advantage variance\nagainst GRPO's",
        terminal_text=_change_text,
        tile=5,
        about="of advantages, against GRPO's baseline",
    ),
    Metric(
        name="worth_in_rollouts",
        label="worth in rollouts",
        topic="advantages",
        compute=worth_in_rollouts,
        better="higher",
        needs="prompts with several rollouts",
        samples=worth_samples,
        bounds=worth_bounds,
        kinds=VALUES,
        format=group_size,
        interval_format=_worth_interval,
        page="no",
        terminal="with interval",
        heading="worth in\nrollouts",
        terminal_text=_worth_text,
        tile=9,
        about="the group whose mean does as well",
    ),
)


def metric_named(name: str) -> Metric:
    """The metric of this name."""
    return next(metric for metric in METRICS if metric.name == name)


def metrics_of(*topics: Topic) -> list[Metric]:
    """The metrics of some topics in the order given; of all topics in the order of TOPICS where none is given."""
    return [metric for topic in topics or TOPICS for metric in METRICS if metric.topic == topic]


def tracker_name(name: str) -> str:
    """A metric's name in trackers."""
    named = {metric.name: metric.tracker for metric in METRICS}
    return named.get(name) or f"val/{name}"


def is_better(name: str, figure: float, than: float) -> bool:
    """Whether one figure of a metric is better than another."""
    return figure < than if metric_named(name).better == "lower" else figure > than
