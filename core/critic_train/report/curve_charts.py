"""Charts of training, step by step; several runs are drawn over each other, long curves in few points."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from critic_train.report.compared_critics import BASELINE_COLOURS, PageCritic, baseline_key, legend, table_of
from critic_train.report.report_sources import Record
from critic_train.report.svg_charts import Chart, Key, colour, dash, svg
from critic_train.report.verdict_model import BASELINES, Column, Series, baseline_series, evaluation_series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]
POINTS = 240
"""Points a curve has at most: more than the pixels a line of its width can show apart."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve in at most POINTS points.

    Attributes:
        x: float64 [p], the middle of each stretch.
        y: float64 [p], its mean.
        low, high: float64 [p], its least and greatest value; equal to `y` where nothing was thinned.
    """

    x: Floats
    y: Floats
    low: Floats
    high: Floats

    @property
    def is_thinned(self) -> bool:
        """Whether a point stands for several."""
        return bool(np.any(self.low != self.high))


def thinned(x: Sequence[float], y: Sequence[float | None], points: int = POINTS) -> Curve:
    """Cut a curve into equal stretches, each with its mean, least and greatest value.

    Args:
        x, y: the curve; a point without a finite y is left out.
        points: stretches at most.
    """
    along = np.array(x, dtype=np.float64)
    up = np.array([np.nan if value is None else value for value in y], dtype=np.float64)
    finite = np.isfinite(up)
    along, up = along[finite], up[finite]
    if len(up) <= points:
        return Curve(along, up, up, up)
    edges = np.linspace(0, len(up), points + 1).round().astype(np.int64)
    starts, counts = edges[:-1], np.diff(edges)
    return Curve(
        np.add.reduceat(along, starts) / counts,
        np.add.reduceat(up, starts) / counts,
        np.minimum.reduceat(up, starts),
        np.maximum.reduceat(up, starts),
    )


Rows = Callable[[PageCritic], Sequence[Record]]

WIDE_RANGE = 50.0
"""A positive curve whose greatest value is this many times its median is drawn on a logarithmic scale."""

FLOOR = -1.0
"""Explained variance below which a chart does not go: twice the variance of having no critic."""

LISTED = 100
"""Evaluations in the table below a chart."""

HELD_OUT = (
    ("explained_variance", "Held-out explained variance", "ev"),
    ("explained_variance_within_group", "Explained variance within prompts", "ev-within"),
)


def curves(critics: Sequence[PageCritic]) -> list[Chart]:
    """The charts that these runs have figures for."""
    runs = [critic for critic in critics if critic.source.is_run]
    charts = [_held_out(runs, key, title, name) for key, title, name in HELD_OUT]
    charts += [
        _by_step(runs, "Training loss", "loss", {"value_loss": ""}, note="Clipped value loss of each mini-batch."),
        _by_step(
            runs,
            "Clipped and held back",
            "clip",
            {"clipfrac": "clipfrac", "saturation": "saturation"},
            note="Shares of tokens: clipfrac, where the clipped loss is the larger; saturation, whose gradient the "
            "clip has zeroed.",
        ),
        _by_step(runs, "Gradient norm", "grad", {"grad_norm": ""}, note="Before --grad-clip."),
        _by_step(runs, "Learning rate", "lr", {"lr": ""}),
        _by_step(
            runs,
            "Tokens a second",
            "speed",
            {"rollout_tokens_per_second": "rollout tokens", "computed_tokens_per_second": "computed tokens"},
            rows=lambda critic: critic.source.timings,
            note="A prefix that rollouts share counts once among the computed tokens.",
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _by_step(
    runs: Sequence[PageCritic],
    title: str,
    name: str,
    series: dict[str, str],
    *,
    rows: Rows = lambda critic: critic.source.steps,
    note: str = "",
) -> Chart | None:
    """One chart of figures that each step has.

    Args:
        runs: the runs.
        title: what it shows.
        name: of the chart, unique on the page.
        series: keys of the records -> what the legend calls them; where two would be drawn over each other
            everywhere, the second is left out.
        rows: the records of a run.
        note: how to read it.
    """
    lines = _lines_by_step(runs, list(series), rows)
    if not lines:
        return None
    several = len({line.key for line in lines}) > 1
    alone = len(runs) == 1

    def draw(axes: "Axes") -> None:
        for line in lines:
            second = list(series).index(line.key) > 0
            drawn_in = colour("series-2" if second and alone else line.run.colour)
            curve = thinned(line.steps, line.figures)
            if curve.is_thinned:
                axes.fill_between(curve.x, curve.low, curve.high, color=drawn_in, alpha=0.18, linewidth=0)
            style = "solid" if alone or not second else (0, (4, 2))
            marker = "o" if len(curve.x) == 1 else None
            axes.plot(curve.x, curve.y, color=drawn_in, linewidth=1.4, linestyle=style, marker=marker, markersize=4)
        _scale(axes, [figure for line in lines for figure in line.figures])

    keys = [] if alone else [Key(text=run.name, colour=run.colour) for run in _distinct([line.run for line in lines])]
    if several and alone:
        keys = [Key(text=series[key], colour="series-1" if i == 0 else "series-2") for i, key in enumerate(series)]
    elif not several and any(series.values()):
        note = f"{note} Shown: {series[lines[0].key]}; the other is the same here.".strip()
    elif several:
        note = f"{note} Dashed: {list(series.values())[1]}.".strip()
    drawing = svg(draw, name=name, described=f"{title} over training steps", x_label="step", integer_ticks=True)
    return Chart(title=title, svg=drawing, note=note, keys=keys)


@dataclass(frozen=True, slots=True)
class _Line:
    """A figure of a run at each step that has it."""

    run: PageCritic
    key: str
    steps: list[float]
    figures: list[float]


def _lines_by_step(runs: Sequence[PageCritic], keys: Sequence[str], rows: Rows) -> list[_Line]:
    """The lines of a chart; a second figure of a run that is the same everywhere is left out."""
    lines: list[_Line] = []
    for run in runs:
        drawn: list[list[float]] = []
        for key in keys:
            with_figure = [row for row in rows(run) if row.get(key) is not None]
            figures: list[float] = [row.get(key) for row in with_figure]
            if figures and figures not in drawn:
                drawn.append(figures)
                lines.append(_Line(run, key, [row.get("step") for row in with_figure], figures))
    return lines


def _scale(axes: "Axes", values: Sequence[float]) -> None:
    """Leave shares and rates their zero; give what spans orders of magnitude a logarithmic scale."""
    least, most, middle = min(values), max(values), sorted(values)[len(values) // 2]
    if least > 0 and most > WIDE_RANGE * middle:
        axes.set_yscale("log")
    elif least >= 0:
        axes.set_ylim(0, most * 1.08 or 1)


def _held_out(runs: Sequence[PageCritic], key: str, title: str, name: str) -> Chart | None:
    """Explained variance at each evaluation with its interval, beside the baselines'."""
    shown = [(run, evaluation_series(_some(_evaluations_with(run, key), POINTS), key)) for run in runs]
    shown = [(run, series) for run, series in shown if series]
    if not shown:
        return None
    alone = len(shown) == 1
    levels = _levels(shown[0][1], key) if alone else {}
    figures = [figure for _, series in shown for figure in series.y]
    # A critic may begin far below zero; its later figures would then be a flat line at the top.
    below = sum(figure < FLOOR for figure in figures) if max(figures) > FLOOR else 0
    note = "Band: 95 % interval over prompt groups."
    if below:
        note += f" Evaluations below {FLOOR:g} are off the chart; the figures have them."

    def draw(axes: "Axes") -> None:
        for baseline, level in levels.items():
            style = BASELINE_COLOURS[baseline]
            axes.plot(level.x, level.y, color=colour(style), linestyle=dash(style), linewidth=1.4)
        for run, series in shown:
            banded = [(step, bounds) for step, bounds in zip(series.x, series.intervals, strict=True) if bounds]
            low, high = [bounds[0] for _, bounds in banded], [bounds[1] for _, bounds in banded]
            steps = [step for step, _ in banded]
            axes.fill_between(steps, low, high, color=colour(run.colour), alpha=0.15, linewidth=0)
            axes.plot(
                series.x,
                series.y,
                color=colour(run.colour),
                linewidth=1.8,
                marker="o",
                markersize=3.5 if len(series.x) <= 60 else 0,
            )
        axes.axhline(0, color=colour("faint"), linewidth=0.8)
        if below:
            axes.set_ylim(FLOOR, 1.05)

    step = Column(label="step", heading="step", cell=lambda row: row.cell("step", str))
    explained = Column(label="explained variance", heading="", cell=lambda row: row.cell(key))
    bounds = Column(label="95 % interval", heading="", cell=lambda row: row.bounds(f"{key}_interval"))
    return Chart(
        title=title,
        svg=svg(draw, name=name, described=f"{title} over training steps", x_label="step", integer_ticks=True),
        note=note,
        keys=legend([run for run, _ in shown], alone="this critic") + [baseline_key(baseline) for baseline in levels],
        table=table_of([(run, _some(series.rows, LISTED)) for run, series in shown], [step, explained, bounds]),
    )


def _evaluations_with(run: PageCritic, key: str) -> list[Record]:
    return [row for row in run.source.evaluations if row.get(key) is not None]


def _levels(critic: Series, key: str) -> dict[str, Series]:
    """Baseline -> its series; a baseline far below the rest would flatten the chart, and is left out."""
    least = min(*critic.y, 0.0)
    levels = {name: baseline_series(critic.rows, key, name) for name in BASELINES}
    return {name: level for name, level in levels.items() if level and min(level.y) > least - 1.0}


def _some(evaluations: Sequence[Record], most: int) -> list[Record]:
    """Every n-th evaluation, so that they are about `most`, and the last."""
    every = max(1, -(-len(evaluations) // most))
    return [row for i, row in enumerate(evaluations) if i % every == 0 or i == len(evaluations) - 1]


def _distinct(runs: Sequence[PageCritic]) -> list[PageCritic]:
    return list({run.number: run for run in runs}.values())
