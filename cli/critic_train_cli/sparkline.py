"""A curve in one line of text."""

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-:=+*#"


def sparkline(values: Sequence[float | None], width: int = 40, *, unicode: bool = True) -> str:
    """The values' course from their least (lowest mark) to their greatest (highest).

    More values than columns are averaged in equal stretches, so that no part of the run is left out. What is
    no finite number is left out.

    Args:
        values: in order.
        width: columns to fill at most.
        unicode: block characters, or ASCII marks of growing weight.
    """
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not known or width < 1:
        return ""
    columns = min(width, len(known))
    edges = [round(i * len(known) / columns) for i in range(columns + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    marks = BLOCKS if unicode else ASCII
    if high == low:
        return marks[0] * columns
    # Halved first, so that a span beyond the largest float is still a number.
    span = high / 2 - low / 2
    return "".join(marks[min(len(marks) - 1, int((m / 2 - low / 2) / span * len(marks)))] for m in means)
