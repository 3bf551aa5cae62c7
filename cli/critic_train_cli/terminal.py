"""What a stream can show: colours, redrawn lines, characters beyond ASCII, how many columns; and a curve in one line.

This is decided here and not left to rich, which takes FORCE_COLOR for a terminal and would write cursor movements into
a log file.
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
    """A curve as one mark a column, the lowest mark for the smallest value and the highest for the largest.

    Where there are more values than columns, a column shows the mean of several.

    Args:
        values: in order; None, NaN and infinite ones are left out.
        width: the most columns.
        unicode: use block characters, else ASCII marks of increasing weight.
    """
    finite = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not finite or width < 1:
        return ""
    columns = min(width, len(finite))
    edges = [round(i * len(finite) / columns) for i in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    marks = BLOCKS if unicode else ASCII
    if high == low:
        return marks[0] * columns
    # Halved first: the difference of two large floats may overflow.
    span = high / 2 - low / 2
    return "".join(marks[min(len(marks) - 1, int((m / 2 - low / 2) / span * len(marks)))] for m in means)


BOLD, DIM, RED, YELLOW, CYAN = "1", "2", "1;31", "1;33", "36"
DEFAULT_WIDTH = 100
"""Columns where the stream is no terminal."""


def is_terminal(stream: TextIO | None) -> bool:
    """Whether this stream is a terminal; a closed or missing one is not."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def can_redraw(stream: TextIO | None) -> bool:
    """Whether lines on this stream can be redrawn."""
    return is_terminal(stream) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def wants_colour(stream: TextIO | None) -> bool:
    """Whether to use colours: NO_COLOR turns them off, FORCE_COLOR on; otherwise a terminal has them."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") != "0":
        return True
    return can_redraw(stream)


def is_unicode(stream: TextIO | None) -> bool:
    """Whether the stream's encoding is UTF, which has block and line-drawing characters."""
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "").startswith("utf")


def paint(text: str, style: str, stream: TextIO | None) -> str:
    """The text in a style (an SGR code), or unchanged where the stream should have no colours."""
    return f"\x1b[{style}m{text}\x1b[0m" if wants_colour(stream) else text


def width_of(stream: TextIO | None, *, widest: int = 100) -> int:
    """Columns to fill: COLUMNS, else the terminal's, at most `widest`."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return min(int(columns), widest)
    try:
        return min(os.get_terminal_size(stream.fileno()).columns or widest, widest) if stream else widest
    except (OSError, ValueError, AttributeError):
        return widest


def escape_unencodable_output() -> None:
    """Write characters that stdout or stderr cannot encode as escapes, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def open_closed_descriptors() -> None:
    """Open /dev/null in place of a closed stdin, stdout or stderr.

    Otherwise the first files that are opened would get descriptors 0 to 2, and what a library writes to "stderr" would
    end up in a checkpoint or a log.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one


def console_on(stream: TextIO | None, *, redraw: bool = False) -> "Console":
    """A rich console that follows the functions above.

    Args:
        stream: where it writes.
        redraw: whether it may move the cursor (for the live view).
    """
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    has_no_width = not is_terminal(stream) and not (columns.isdigit() and int(columns) > 0)
    return Console(
        file=stream,
        force_terminal=True if redraw else is_terminal(stream) or wants_colour(stream),
        force_interactive=redraw,
        color_system="standard" if wants_colour(stream) else None,
        width=DEFAULT_WIDTH if has_no_width else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
