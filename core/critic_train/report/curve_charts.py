"""Long curves in few points, without losing a spike.

Charts of how a run went, step by step; several runs are drawn over each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from critic_train.report.compared_critics import BASELINES, INK_OF, Subject
from critic_train.report.report_sources import Record
from critic_train.report.svg_charts import Chart, Key, dash, ink, svg

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


def thinned(x: list[float], y: list[float | None], points: int = POINTS) -> Curve:
    """Cut a curve into equal stretches, each with its mean, least and greatest value.

    Args:
        x, y: the curve; a point without a finite y is left out.
        points: stretches at most.
    """
    along = np.array(x, dtype=np.float64)
    up = np.array([np.nan if value is None else value for value in y], dtype=np.float64)
    known = np.isfinite(up)
    along, up = along[known], up[known]
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


Rows = Callable[[Subject], Sequence[Record]]

WIDE_RANGE = 50.0
"""A positive curve whose greatest value is this many times its median is drawn on a logarithmic scale."""

FLOOR = -1.0
"""Explained variance below which a chart does not go: twice the variance of having no critic."""

HELD_OUT = (
    ("explained_variance", "Held-out explained variance", "ev"),
    ("explained_variance_within_group", "Explained variance within prompts", "ev-within"),
)


def curves(subjects: Sequence[Subject]) -> list[Chart]:
    """The charts that these runs have figures for."""
    runs = [subject for subject in subjects if subject.source.is_run]
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
            rows=lambda subject: subject.source.timings,
            note="A prefix that rollouts share counts once among the computed tokens.",
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _by_step(
    runs: Sequence[Subject],
    title: str,
    name: str,
    series: dict[str, str],
    *,
    rows: Rows = lambda subject: subject.source.steps,
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
    found: list[tuple[Subject, str, list[float], list[float | None]]] = []
    for run in runs:
        drawn: list[list[float | None]] = []
        for key in series:
            known = [row for row in rows(run) if row.get(key) is not None]
            up: list[float | None] = [row.get(key) for row in known]
            if known and up not in drawn:
                drawn.append(up)
                found.append((run, key, [row.get("step") for row in known], up))
    if not found:
        return None
    several = len({key for _, key, _, _ in found}) > 1
    alone = len(runs) == 1

    def draw(axes: "Axes") -> None:
        for run, key, along, up in found:
            second = list(series).index(key) > 0
            colour = ink("series-2" if second and alone else run.ink)
            curve = thinned(along, up)
            if curve.is_thinned:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
            style = "solid" if alone or not second else (0, (4, 2))
            marker = "o" if len(curve.x) == 1 else None
            axes.plot(curve.x, curve.y, color=colour, linewidth=1.4, linestyle=style, marker=marker, markersize=4)
        _scale(axes, [value for *_, up in found for value in up if value is not None])

    keys = [Key(text=run.name, ink=run.ink) for run in _distinct([run for run, *_ in found])] if not alone else []
    if several and alone:
        keys = [Key(text=series[key], ink="series-1" if i == 0 else "series-2") for i, key in enumerate(series)]
    elif not several and any(series.values()):
        note = f"{note} Shown: {series[found[0][1]]}; the other is the same here.".strip()
    elif several:
        note = f"{note} Dashed: {list(series.values())[1]}.".strip()
    drawing = svg(draw, name=name, described=f"{title} over training steps", x_label="step", whole_steps=True)
    return Chart(title=title, svg=drawing, note=note, keys=keys)


def _scale(axes: "Axes", values: Sequence[float]) -> None:
    """Leave shares and rates their zero; give what spans orders of magnitude a logarithmic scale."""
    least, most, middle = min(values), max(values), sorted(values)[len(values) // 2]
    if least > 0 and most > WIDE_RANGE * middle:
        axes.set_yscale("log")
    elif least >= 0:
        axes.set_ylim(0, most * 1.08 or 1)


def _held_out(runs: Sequence[Subject], key: str, title: str, name: str) -> Chart | None:
    """Explained variance at each evaluation with its interval, beside the baselines'."""
    known = [(run, [row for row in run.source.evaluations if row.get(key) is not None]) for run in runs]
    found = [(run, _some(rows, POINTS)) for run, rows in known if rows]
    if not found:
        return None
    alone = len(found) == 1
    levels = _levels(found[0][1], key) if alone else {}
    figures = [row.get(key) for _, rows in found for row in rows]
    # A critic may begin far below zero; what it came to would then be a flat line at the top.
    below = sum(figure < FLOOR for figure in figures) if max(figures) > FLOOR else 0
    note = "Band: 95 % interval over prompt groups."
    if below:
        note += f" Evaluations below {FLOOR:g} are off the chart; the figures have them."

    def draw(axes: "Axes") -> None:
        for baseline, (along, up) in levels.items():
            style = INK_OF[baseline]
            axes.plot(along, up, color=ink(style), linestyle=dash(style), linewidth=1.4)
        for run, rows in found:
            banded = [row for row in rows if row.get(f"{key}_interval")]
            bounds = [row.get(f"{key}_interval") for row in banded]
            steps = [row.get("step") for row in banded]
            low, high = [b[0] for b in bounds], [b[1] for b in bounds]
            axes.fill_between(steps, low, high, color=ink(run.ink), alpha=0.15, linewidth=0)
            axes.plot(
                [row.get("step") for row in rows],
                [row.get(key) for row in rows],
                color=ink(run.ink),
                linewidth=1.8,
                marker="o",
                markersize=3.5 if len(rows) <= 60 else 0,
            )
        axes.axhline(0, color=ink("faint"), linewidth=0.8)
        if below:
            axes.set_ylim(FLOOR, 1.05)

    keys = [Key(text=run.name if not alone else "this critic", ink=run.ink) for run, _ in found]
    keys += [Key(text=BASELINES[b], ink=INK_OF[b], mark=INK_OF[b]) for b in levels]
    return Chart(
        title=title,
        svg=svg(draw, name=name, described=f"{title} over training steps", x_label="step", whole_steps=True),
        note=note,
        keys=keys,
        table=_evaluation_table(found, key),
    )


def _levels(rows: Sequence[Record], key: str) -> dict[str, tuple[list[float], list[float]]]:
    """Baseline -> its steps and figures; a baseline far below the rest would flatten the chart, and is left out."""
    least = min(min(row.get(key) for row in rows), 0.0)
    levels = {}
    for name in BASELINES:
        known = [(row.get("step"), row.part("baselines").part(name).get(key)) for row in rows]
        known = [(step, figure) for step, figure in known if figure is not None]
        if known and min(figure for _, figure in known) > least - 1.0:
            levels[name] = ([step for step, _ in known], [figure for _, figure in known])
    return levels


def _evaluation_table(found: Sequence[tuple[Subject, Sequence[Record]]], key: str) -> list[list[object]]:
    """The figures behind the chart; of very many evaluations, some."""
    rows: list[list[object]] = [["step", "explained variance", "95 % interval"]]
    for run, evaluations in found:
        if len(found) > 1:
            rows.append([run.name, "", ""])
        shown = _some(evaluations, 100)
        rows += [[row.cell("step", str), row.cell(key), row.bounds(f"{key}_interval")] for row in shown]
    return rows


def _some(evaluations: Sequence[Record], most: int) -> list[Record]:
    """Every so manieth evaluation, so that they are about `most`, and the last."""
    every = -(-len(evaluations) // most)
    return [row for i, row in enumerate(evaluations) if i % every == 0 or i == len(evaluations) - 1]


def _distinct(runs: Sequence[Subject]) -> list[Subject]:
    return list({run.number: run for run in runs}.values())
