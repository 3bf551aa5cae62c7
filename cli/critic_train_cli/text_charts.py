"""The charts of the report in characters, for a machine without a browser.

`plane` draws points over a plane, `on_a_scale` one row of a chart of figures on a common scale.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from critic_train.report.report_sources import Record
from critic_train.report.verdict_model import (
    MAIN,
    Series,
    auc_series,
    baseline_series,
    calibration_series,
    evaluation_series,
    position_series,
    shown_name,
)
from critic_train.text import fixed, short, with_interval

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Marks:
    """The characters that a chart is drawn with."""

    critic: str
    baselines: tuple[str, ...]
    line: str
    axis: str
    corner: str
    aim: str


BLOCKS = Marks(critic="●", baselines=("┄", "╌", "·"), line="─", axis="│", corner="└", aim="┃")
LETTERS = Marks(critic="o", baselines=("=", "-", "."), line="-", axis="|", corner="+", aim="|")


def marks(*, unicode: bool) -> Marks:
    """Box-drawing characters, or ASCII."""
    return BLOCKS if unicode else LETTERS


@dataclass(frozen=True, slots=True)
class Line:
    """Points over a plane that share a mark; drawn in the order given, later over earlier."""

    mark: str
    x: Sequence[float]
    y: Sequence[float | None]


def plane(lines: Sequence[Line], *, width: int, height: int, signs: Marks, decimals: int = 2) -> list[str]:
    """Points over a plane, with the y scale at the left and the x scale below.

    Args:
        lines: what to draw; points without a finite y are left out, and between the points of a line there are
            columns that take the value in between.
        width, height: of the plane itself and of its labels, in characters.
        signs: what to draw with.
        decimals: of the y scale.

    Returns:
        `height` + 2 lines of at most `width` characters; none where there is nothing to draw or no room.
    """
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if y is not None]
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return []
    low, high = min(y for _, y in points), max(y for _, y in points)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    labels = [f"{value:.{decimals}f}" for value in (high, low)]
    margin = max(map(len, labels))
    columns = width - margin - 2
    if columns < 8 or height < 3:
        return []
    canvas = [[" "] * columns for _ in range(height)]
    for line in lines:
        for column in range(columns):
            value = _between(line, first + (last - first) * column / (columns - 1), first == last)
            if value is not None:
                row = round((high - value) / (high - low) * (height - 1)) if high > low else height // 2
                canvas[row][column] = line.mark
    texts = [""] * height
    texts[0], texts[-1] = labels
    shown = [
        f"{text:>{margin}} {signs.axis}{''.join(cells)}".rstrip() for text, cells in zip(texts, canvas, strict=True)
    ]
    ends = f"{short(first)}{short(last):>{max(1, columns - len(short(first)))}}"
    shown.append(f"{'':>{margin}} {signs.corner}{signs.line * columns}")
    return [*shown, f"{'':>{margin}}  {ends}"]


def _between(line: Line, x: float, single: bool) -> float | None:
    """The line's value at x: that of the points about it, in proportion; None before the first and after the last."""
    points = [(a, b) for a, b in zip(line.x, line.y, strict=True) if b is not None and math.isfinite(b)]
    if not points:
        return None
    if single:
        return points[-1][1]
    if not points[0][0] <= x <= points[-1][0]:
        return None
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def on_a_scale(
    figure: float,
    interval: Sequence[float] | None,
    aim: float | None,
    *,
    low: float,
    high: float,
    width: int,
    signs: Marks,
) -> str:
    """One figure on a scale from low to high: its interval as a line, itself as a point, and what it should be.

    Args:
        figure: the figure.
        interval: [low, high] of it, or None.
        aim: what it is compared with, or None.
        low, high: the ends of the scale.
        width: characters.
        signs: what to draw with.
    """
    cells = [" "] * width

    def column_of(value: float) -> int:
        share = (value - low) / (high - low) if high > low else 0.5
        return max(0, min(width - 1, round(share * (width - 1))))

    if interval:
        for column in range(column_of(interval[0]), column_of(interval[1]) + 1):
            cells[column] = signs.line
    if aim is not None:
        cells[column_of(aim)] = signs.aim
    cells[column_of(figure)] = signs.critic
    return "".join(cells).rstrip()


WIDEST, TALLEST = 76, 9
NARROWEST = 34
"""Columns below which charts are left out; the tables have the figures."""


@dataclass(frozen=True, slots=True)
class Paper:
    """What charts are drawn on: a console, the columns to fill, the characters to draw with."""

    console: "Console"
    width: int
    signs: Marks


def draw_charts(
    console: "Console",
    verdict: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    *,
    beside_tables: bool = False,
) -> None:
    """Print the charts that there are figures and room for.

    Args:
        console: where.
        verdict: eval's result, or what a run keeps of its best evaluation; may be empty.
        evaluations: of a run, in order; may be empty.
        beside_tables: leave out what eval's tables have already: explained variance along the response.
    """
    paper = Paper(console, min(console.width, WIDEST), marks(unicode=console.encoding.startswith("utf")))
    if paper.width < NARROWEST:
        return
    draw_evaluations(paper, [Record(row, "") for row in evaluations])
    record = Record(verdict, "")
    critics = record.part("critics").parts()
    for name, critic in critics.items():
        title = f" of {name}" if len(critics) > 1 else ""
        draw_calibration(paper, calibration_series(critic), title)
        if not beside_tables:
            draw_explained(paper, critic, record.part("baselines").part("group_mean"), title)
        draw_auc(paper, auc_series(critic), title)


def draw_evaluations(paper: Paper, evaluations: Sequence[Record]) -> None:
    """Held-out explained variance over the steps, with the baselines."""
    critic = evaluation_series(evaluations, MAIN)
    if len(critic.x) < 2:
        return
    signs = paper.signs
    lines, legend = [], []
    for name, mark in zip(("group_mean", "stored"), signs.baselines, strict=False):
        series = baseline_series(critic.rows, MAIN, name)
        if series:
            lines.append(Line(mark, series.x, series.y))
            legend.append(f"{mark * 2} {shown_name(name)}")
    lines.append(Line(signs.baselines[2], critic.x, [0.0] * len(critic.x)))
    lines.append(Line(signs.critic, critic.x, critic.y))
    legend = [f"{signs.critic} this critic", *legend, f"{signs.baselines[2] * 2} {shown_name('constant')}"]
    shown = plane(lines, width=paper.width, height=TALLEST, signs=signs)
    _print(paper.console, "Held-out explained variance by step", shown, legend)


def draw_calibration(paper: Paper, series: Series, of: str) -> None:
    """A row for each bin of values: the mean return of its tokens beside the value that was predicted."""
    if not series:
        return
    signs = paper.signs
    points = list(zip(series.x, series.y, series.intervals, strict=True))
    ends = [end for x, y, bounds in points for end in (x, y, *(bounds or ()))]
    texts = [(fixed(x), with_interval(y, bounds)) for x, y, bounds in points]
    first, second = (max(len(text[i]) for text in texts) for i in (0, 1))
    if paper.width - first - second - 6 < 12:
        texts, second = [(fixed(x), fixed(y)) for x, y, _ in points], 6
    room = paper.width - first - second - 6
    lines = [f"  {'value':<{first}}  {'return':<{second}}".rstrip()]
    for (value, returned), (x, y, bounds) in zip(texts, points, strict=True):
        drawn = on_a_scale(y, bounds, x, low=min(ends), high=max(ends), width=room, signs=signs)
        lines.append(f"  {value:<{first}}  {returned:<{second}}  {drawn}".rstrip())
    lines += axis(min(ends), max(ends), margin=first + second + 6, width=room, signs=signs)
    legend = [f"{signs.critic} mean return", f"{signs.aim} the value predicted", f"{signs.line * 2} 95 % interval"]
    _print(paper.console, f"Calibration{of}", lines, legend)


def draw_explained(paper: Paper, critic: Record, group_mean: Record, of: str) -> None:
    """Explained variance along the response, beside that of the prompt group's mean."""
    others = position_series(group_mean)
    complete = bool(others) and len(others.x) == len(critic.rows("by_position"))
    aims = dict(zip(others.x, others.y, strict=True)) if complete else {}
    legend = [f"{paper.signs.critic} explained variance"]
    legend += [f"{paper.signs.aim} the prompt group's mean's"] if aims else []
    # From 0 on, so that figures which hardly differ do not stand at opposite ends.
    _along(paper, f"Explained variance along the response{of}", position_series(critic), aims, legend, least=0.0)


def draw_auc(paper: Paper, series: Series, of: str) -> None:
    """AUC within prompts along the response: from which part on it separates right rollouts from wrong ones."""
    signs = paper.signs
    legend = [f"{signs.critic} AUC within prompts", f"{signs.aim} a coin", f"{signs.line * 2} 95 % interval"]
    title = f"From which part of the response on it tells right from wrong{of}"
    _along(paper, title, series, dict.fromkeys(series.x, 0.5), legend)


def _along(
    paper: Paper,
    title: str,
    series: Series,
    aims: Mapping[float, float],
    legend: Sequence[str],
    *,
    least: float | None = None,
) -> None:
    """A row for each part of the response: its figure and interval on one scale, beside what it is compared with.

    Args:
        paper: what to draw on.
        title: of the chart.
        series: the figures.
        aims: what each is compared with.
        legend: what the characters stand for.
        least: a figure that is on the scale in any case.
    """
    if not series:
        return
    points = list(zip(series.rows, series.x, series.y, series.intervals, strict=True))
    ends = [end for _, x, y, bounds in points for end in (y, aims.get(x), least, *(bounds or ())) if end is not None]
    low, high, width = min(ends), max(ends), paper.width - 21
    lines = []
    for row, x, y, bounds in points:
        part = f"{100 * row.get('from'):.0f}-{100 * row.get('to'):.0f} %"
        drawn = on_a_scale(y, bounds, aims.get(x), low=low, high=high, width=width, signs=paper.signs)
        lines.append(f"  {part:<9}  {fixed(y):>6}  {drawn}".rstrip())
    lines += axis(low, high, margin=21, width=width, signs=paper.signs)
    _print(paper.console, title, lines, legend)


def axis(low: float, high: float, *, margin: int, width: int, signs: Marks) -> list[str]:
    """The scale of `on_a_scale` below its rows: a line, and the figures at its ends.

    Args:
        low, high: the ends of the scale.
        margin: columns before it.
        width: characters of the scale.
        signs: what to draw with.
    """
    ends = f"{fixed(low)}{fixed(high):>{max(1, width - len(fixed(low)))}}"
    return [f"{'':>{margin}}{signs.corner}{signs.line * (width - 1)}", f"{'':>{margin}}{ends}"]


def _print(console: "Console", title: str, lines: Sequence[str], legend: Sequence[str]) -> None:
    if not lines:
        return
    console.print(f"\n{title}", style="bold")
    for line in lines:
        console.print(line, soft_wrap=True)
    line = ""
    for entry in legend:
        if line and len(line) + 3 + len(entry) > console.width - 2:
            console.print(f"  {line}", style="dim")
            line = ""
        line += ("   " if line else "") + entry
    console.print(f"  {line}", style="dim")
