"""A curve in one line of text.

What a stream can show: colours, a live view, characters beyond ASCII.

Decided here once, and not left to rich, because rich takes FORCE_COLOR for a terminal: a log file would
then be drawn upon with cursor movements.
"""

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

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


BOLD, DIM, RED, YELLOW, CYAN = "1", "2", "1;31", "1;33", "36"
WIDTH_OFF_A_TERMINAL = 100


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person watches this stream; a closed or missing stream has no one."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def can_redraw(stream: TextIO | None) -> bool:
    """Whether lines already written to this stream can be drawn over."""
    return is_terminal(stream) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def wants_colour(stream: TextIO | None) -> bool:
    """NO_COLOR turns colours off, FORCE_COLOR on; otherwise a capable terminal has them."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") != "0":
        return True
    return can_redraw(stream)


def is_unicode(stream: TextIO | None) -> bool:
    """Whether the stream's encoding has block and line-drawing characters."""
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "").startswith("utf")


def paint(text: str, style: str, stream: TextIO | None) -> str:
    """The text in a style, or as it is where the stream should have none."""
    return f"\x1b[{style}m{text}\x1b[0m" if wants_colour(stream) else text


def width_of(stream: TextIO | None, *, widest: int = 100) -> int:
    """Columns to fill: COLUMNS, else the terminal's own, at most `widest`."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return min(int(columns), widest)
    try:
        return min(os.get_terminal_size(stream.fileno()).columns or widest, widest) if stream else widest
    except (OSError, ValueError, AttributeError):
        return widest


def replace_undecodable_output() -> None:
    """Let no character end the program: what a stream cannot encode is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def open_closed_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr was closed.

    The first files that are opened would take their numbers, and what a library writes to "stderr" would go into a
    checkpoint or a log.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


def console_on(stream: TextIO | None, *, redraw: bool = False) -> "Console":
    """A rich console that agrees with the answers above.

    Args:
        stream: where it writes.
        redraw: whether cursor movements are wanted (the live view).
    """
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    unknown = not is_terminal(stream) and not (columns.isdigit() and int(columns) > 0)
    return Console(
        file=stream,
        force_terminal=True if redraw else is_terminal(stream) or wants_colour(stream),
        force_interactive=redraw,
        color_system="standard" if wants_colour(stream) else None,
        width=WIDTH_OFF_A_TERMINAL if unknown else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
