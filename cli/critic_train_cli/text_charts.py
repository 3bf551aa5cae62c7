"""Small charts in characters: points over a plane, and rows of points on one scale.

The charts of the report in characters, for people on a machine without a browser.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from critic_train.text import fixed, number, short, with_interval
from critic_train_cli.table_columns import BASELINES

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
    known = [(a, b) for a, b in zip(line.x, line.y, strict=True) if b is not None and math.isfinite(b)]
    if not known:
        return None
    if single:
        return known[-1][1]
    if not known[0][0] <= x <= known[-1][0]:
        return None
    for (x0, y0), (x1, y1) in pairwise(known):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return known[-1][1]


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

    def place(value: float) -> int:
        share = (value - low) / (high - low) if high > low else 0.5
        return max(0, min(width - 1, round(share * (width - 1))))

    if interval:
        for column in range(place(interval[0]), place(interval[1]) + 1):
            cells[column] = signs.line
    if aim is not None:
        cells[place(aim)] = signs.aim
    cells[place(figure)] = signs.critic
    return "".join(cells).rstrip()


WIDEST, TALLEST = 76, 9
NARROWEST = 34
"""Columns below which a chart says nothing that the figures do not."""

Metrics = Mapping[str, Any]


def draw_charts(
    console: "Console", verdict: Metrics, evaluations: Sequence[Metrics], *, beside_tables: bool = False
) -> None:
    """Print the charts that there are figures and room for.

    Args:
        console: where.
        verdict: eval's result, or what a run keeps of its best evaluation; may be empty.
        evaluations: of a run, in order; may be empty.
        beside_tables: leave out what eval's tables tell already: explained variance along the response.
    """
    wide = min(console.width, WIDEST)
    if wide < NARROWEST:
        return
    signs = marks(unicode=console.encoding.startswith("utf"))
    draw_course(console, evaluations, wide, signs)
    critics = verdict.get("critics") or {}
    for name, metrics in critics.items():
        title = f" of {name}" if len(critics) > 1 else ""
        draw_calibration(console, metrics, title, wide, signs)
        if not beside_tables:
            others = (verdict.get("baselines") or {}).get("group_mean") or {}
            draw_explained(console, metrics, others, title, wide, signs)
        draw_right_from_wrong(console, metrics, title, wide, signs)


def draw_course(console: "Console", evaluations: Sequence[Metrics], wide: int, signs: Marks) -> None:
    """Held-out explained variance over the steps, with the baselines."""
    key = "explained_variance"
    known = [row for row in evaluations if number(row.get(key)) is not None]
    if len(known) < 2:
        return
    steps = [row["step"] for row in known]
    lines, legend = [], []
    for name, mark in zip(("group_mean", "stored"), signs.baselines, strict=False):
        found = [number(((row.get("baselines") or {}).get(name) or {}).get(key)) for row in known]
        if any(figure is not None for figure in found):
            lines.append(Line(mark, steps, found))
            legend.append(f"{mark * 2} {BASELINES[name]}")
    lines.append(Line(signs.baselines[2], steps, [0.0] * len(steps)))
    lines.append(Line(signs.critic, steps, [number(row[key]) for row in known]))
    legend = [f"{signs.critic} this critic", *legend, f"{signs.baselines[2] * 2} {BASELINES['constant']}"]
    _print(
        console, "Held-out explained variance by step", plane(lines, width=wide, height=TALLEST, signs=signs), legend
    )


def draw_calibration(console: "Console", metrics: Metrics, of: str, wide: int, signs: Marks) -> None:
    """A row for each bin of values: the mean return of its tokens beside the value that was predicted."""
    rows = [row for row in metrics.get("calibration") or [] if number(row.get("mean_value")) is not None]
    rows = [row for row in rows if number(row.get("mean_return")) is not None]
    if not rows:
        return
    ends = [row[key] for row in rows for key in ("mean_value", "mean_return")]
    ends += [bound for row in rows for bound in row.get("interval") or ()]
    texts = [(fixed(row["mean_value"]), with_interval(row["mean_return"], row.get("interval"))) for row in rows]
    first, second = (max(len(text[i]) for text in texts) for i in (0, 1))
    if wide - first - second - 6 < 12:
        texts, second = [(value, fixed(row["mean_return"])) for (value, _), row in zip(texts, rows, strict=True)], 6
    room = wide - first - second - 6
    lines = [f"  {'value':<{first}}  {'return':<{second}}".rstrip()]
    for (value, returned), row in zip(texts, rows, strict=True):
        drawn = on_a_scale(
            row["mean_return"],
            row.get("interval"),
            row["mean_value"],
            low=min(ends),
            high=max(ends),
            width=room,
            signs=signs,
        )
        lines.append(f"  {value:<{first}}  {returned:<{second}}  {drawn}".rstrip())
    legend = [f"{signs.critic} mean return", f"{signs.aim} the value predicted", f"{signs.line * 2} 95 % interval"]
    _print(console, f"Calibration{of}", lines, legend)


def draw_explained(console: "Console", metrics: Metrics, group_mean: Metrics, of: str, wide: int, signs: Marks) -> None:
    """Explained variance along the response, beside that of the prompt group's mean."""
    key = "explained_variance"
    aims = [number(row.get(key)) for row in group_mean.get("by_position") or []]
    rows = metrics.get("by_position") or []
    if len(aims) != len(rows) or None in aims:
        aims = [None] * len(rows)
    legend = [f"{signs.critic} explained variance"]
    legend += [f"{signs.aim} the prompt group's mean's"] if any(aim is not None for aim in aims) else []
    _along(console, f"Explained variance along the response{of}", rows, key, aims, legend, wide, signs)


def draw_right_from_wrong(console: "Console", metrics: Metrics, of: str, wide: int, signs: Marks) -> None:
    """AUC within prompts along the response: from which part on right rollouts are told from wrong ones."""
    rows = metrics.get("auc_by_position") or []
    legend = [f"{signs.critic} AUC within prompts", f"{signs.aim} a coin", f"{signs.line * 2} 95 % interval"]
    title = f"From which part of the response on it tells right from wrong{of}"
    _along(console, title, rows, "auc_within_group", [0.5] * len(rows), legend, wide, signs)


def _along(
    console: "Console",
    title: str,
    rows: Sequence[Metrics],
    key: str,
    aims: Sequence[float | None],
    legend: Sequence[str],
    wide: int,
    signs: Marks,
) -> None:
    """A row for each part of the response: its figure and interval on one scale, beside what it is compared with."""
    known = [(row, aim) for row, aim in zip(rows, aims, strict=True) if number(row.get(key)) is not None]
    if not known:
        return
    ends = [end for row, aim in known for end in (row[key], aim, *(row.get("interval") or ())) if end is not None]
    lines = []
    for row, aim in known:
        part = f"{100 * row['from']:.0f}-{100 * row['to']:.0f} %"
        scale = {"low": min(ends), "high": max(ends), "width": wide - 21, "signs": signs}
        drawn = on_a_scale(row[key], row.get("interval"), aim, **scale)
        lines.append(f"  {part:<9}  {fixed(row[key]):>6}  {drawn}".rstrip())
    _print(console, title, lines, legend)


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
