"""Small charts in characters: points over a plane, and rows of points on one scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from critic_train.figures import short


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
