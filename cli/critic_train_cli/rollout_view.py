"""Rollouts in the terminal: the text of each token shaded by its value; value, old value and return beside each line.

Lines are cut by columns of the terminal. The figures beside a line are means over its response tokens.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from critic_train.text import DASH, number
from critic_train_cli.terminal import BOLD, DIM, paint, wants_colour

if TYPE_CHECKING:
    from rich.console import Console

ABOVE = (230, 229, 223, 222, 216, 215, 214, 208, 202, 196)
BELOW = (195, 189, 153, 147, 117, 111, 75, 69, 63, 57)
"""Colours of the 256 that terminals have, from a light to a full shade."""
FIGURE = 8
"""Columns of one figure beside a line."""
PROMPT_LINES = 4
"""Lines shown of a prompt: its last."""
NARROWEST_TEXT = 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a token on one line: its text, and the token's index."""

    text: str
    token: int


def draw_rollouts(console: "Console", rollouts: Sequence[dict[str, Any]]) -> None:
    """Print rollouts, one below the other, in the form of `show`'s result."""
    stream: Any = console.file
    coloured = wants_colour(stream)
    middle, span = shades_of(rollouts)
    columns = [("value", "values"), ("old", "old_values"), ("return", "returns")]
    columns = [(name, key) for name, key in columns if any(rollout[key] for rollout in rollouts)]
    width = max(NARROWEST_TEXT, console.width - 1 - FIGURE * len(columns))
    if coloured:
        stream.write(scale_line(middle, span) + "\n")
    for rollout in rollouts:
        stream.write("\n" + paint(title(rollout), BOLD, stream) + "\n")
        heading = " " * width + "".join(f"{name:>{FIGURE}}" for name, _ in columns)
        stream.write(paint(heading.rstrip(), DIM, stream) + "\n")
        for line in lines_of(rollout, width, columns, (middle, span) if coloured else None):
            stream.write(line + "\n")
    stream.flush()


def title(rollout: dict[str, Any]) -> str:
    """What a rollout is and how it did, in one line."""
    if rollout["file"] is None:
        named = "text"
    else:
        named = f"{rollout['file']} row {rollout['row']}"
        if rollout["uid"] is not None:
            of = rollout["of"]
            named = f"uid {rollout['uid']} ({of} rollout{'' if of == 1 else 's'})  {named}"
    figures = f"mean value {figure(rollout['mean_value']).strip()}"
    if rollout["mean_return"] is not None:
        figures += f", mean return {figure(rollout['mean_return']).strip()}"
    # A uid is data: it must not move the cursor.
    return "".join(character if character.isprintable() else "?" for character in f"{named}  {figures}")


def lines_of(
    rollout: dict[str, Any], width: int, columns: Sequence[tuple[str, str]], shading: tuple[float, float] | None
) -> Iterator[str]:
    """The prompt's last lines, dimmed; then the response's lines with their figures.

    Args:
        rollout: in the form of `show`'s result.
        width: columns of the text.
        columns: heading and key of each figure.
        shading: middle and span of the shades; None where there are no colours.
    """
    texts, mask = rollout["texts"], rollout["response_mask"]
    first = mask.index(True)
    prompt = list(cut(texts[:first], 0, width))
    if len(prompt) > PROMPT_LINES:
        yield "..."
    for line in prompt[-PROMPT_LINES:]:
        text = "".join(piece.text for piece in line)
        yield f"\x1b[{DIM}m{text}\x1b[0m" if shading else text
    for line in cut(texts[first:], first, width):
        tokens = dict.fromkeys(piece.token for piece in line)
        text = "".join(shaded(piece, rollout["values"], shading) for piece in line)
        used = sum(columns_of(piece.text) for piece in line)
        means = [mean_of([rollout[key][token] for token in tokens] if rollout[key] else []) for _, key in columns]
        yield (text + " " * (width - used) + "".join(figure(mean) for mean in means)).rstrip()


def cut(texts: Sequence[str], first: int, width: int) -> Iterator[list[Piece]]:
    """Cut texts of tokens into lines of at most `width` columns, at their own line ends too.

    Args:
        texts: of tokens.
        first: the index of the first.
        width: columns of a line.
    """
    line: list[Piece] = []
    used = 0
    for token, text in enumerate(texts, start=first):
        piece = ""
        for character in text:
            if character == "\n":
                line.append(Piece(piece, token))
                yield line
                line, used, piece = [], 0, ""
                continue
            shown = character if character.isprintable() else " "
            wide = columns_of(shown)
            if used + wide > width:
                line.append(Piece(piece, token))
                yield line
                line, used, piece = [], 0, ""
            piece, used = piece + shown, used + wide
        line.append(Piece(piece, token))
    if any(piece.text for piece in line):
        yield line


def columns_of(text: str) -> int:
    """Columns of a text in a terminal: 2 for a wide character, none for one that combines with the one before."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shades_of(rollouts: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(mean value of all tokens, the value furthest from it): no shade, and the full shade."""
    values = [value for rollout in rollouts for value in rollout["values"] if value is not None]
    middle = sum(values) / len(values)
    return middle, max(abs(value - middle) for value in values)


def shaded(piece: Piece, values: Sequence[float | None], shading: tuple[float, float] | None) -> str:
    """A piece on the background of its token's value; as it is where there are no colours or no value."""
    value = values[piece.token]
    if shading is None or value is None or not piece.text:
        return piece.text
    colour = shade(value, *shading)
    return piece.text if colour is None else f"\x1b[38;5;16;48;5;{colour}m{piece.text}\x1b[0m"


def shade(value: float, middle: float, span: float) -> int | None:
    """The colour of a value; None at the middle."""
    step = round(len(ABOVE) * (value - middle) / span) if span else 0
    step = max(-len(BELOW), min(len(ABOVE), step))
    return None if not step else ABOVE[step - 1] if step > 0 else BELOW[-step - 1]


def scale_line(middle: float, span: float) -> str:
    """The shades from the lowest value to the highest, with the values of both ends and of the middle."""
    low = "".join(f"\x1b[48;5;{colour}m \x1b[0m" for colour in reversed(BELOW))
    high = "".join(f"\x1b[48;5;{colour}m \x1b[0m" for colour in ABOVE)
    return f"{middle - span:.3f} {low} {middle:.3f} {high} {middle + span:.3f}"


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def figure(value: float | None) -> str:
    """A figure, right-aligned in its columns."""
    text = DASH if number(value) is None else f"{value:.3f}"
    return f"{text:>{FIGURE}}"
