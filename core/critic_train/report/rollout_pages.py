"""Rollouts to read: the text of each token, by the model's tokenizer, shaded by its value."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from critic_train.report.compared_critics import PageCritic
from critic_train.report.provenance import show_command
from critic_train.report.report_sources import Cell, Record, Source, pointer
from critic_train.report.svg_charts import LOW, colour, dash, svg
from critic_train.run.checkpoint import checkpoints
from critic_train.text import fixed, three

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\ufffd"
LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most, of a character in UTF-8."""


def token_texts(ids: Sequence[int], decode: Decode | None) -> list[str]:
    """The text that each token adds.

    A token's text may depend on the one before it (a leading space), and a character may be spread over several
    tokens: then the last of them has it and the others have none. So each token is decoded together with the
    text just before it, and what that gives beyond the text without it is the token's own.

    Args:
        ids: tokens.
        decode: token ids -> text, special tokens included; None where there is no tokenizer.

    Returns:
        As many texts as ids; the number itself where there is no tokenizer.
    """
    if decode is None:
        return [f" {number}" for number in ids]
    texts: list[str] = []
    start = done = 0  # ids[start:done] is the text before, all of its characters complete
    before = ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        is_partial = text.endswith(UNFINISHED) and end - done < LONGEST_CHARACTER and end < len(ids)
        if is_partial:
            texts.append("")
            continue
        texts.append(text[len(before) :] if text.startswith(before) else decode(ids[done:end]))
        start, done = done, end
        before = decode(ids[start:done])
    return texts


def decoder_of(source: Source, tokenizer: str | None = None) -> Decode | None:
    """A decoder from the first folder that has a tokenizer: the one given, the critic judged, the model trained.

    Args:
        source: a run or an evaluation.
        tokenizer: a directory with tokenizer.json, or such a file.
    """
    file = tokenizer_file(_tokenizer_folders(source, tokenizer))
    return None if file is None else _decoder(file)


def tokenizer_file(folders: Sequence[Path]) -> Path | None:
    """The tokenizer.json of the first of some folders that has one, or the first that is a file itself."""
    for folder in folders:
        file = folder if os.path.isfile(folder) else folder / "tokenizer.json"
        if os.path.isfile(file):  # unlike Path's own, no error for a name that can be none
            return file
    return None


def _tokenizer_folders(source: Source, tokenizer: str | None) -> list[Path]:
    if tokenizer is not None:
        return [Path(tokenizer)]
    names = [str(path) for path in source.evaluation.get("models") or []]
    names += [str(source.path)] if source.is_run and source.path else []
    based_on = source.started.part("settings").get("model")
    names += [str(based_on)] if based_on else []
    return [folder for name in names for folder in model_folders(Path(name))]


def model_folders(path: Path) -> list[Path]:
    """A model's directory, or the checkpoints of a run; no path at all where the name can be none."""
    try:
        return [path, path / "best", *reversed(checkpoints(path / "checkpoints"))]
    except (OSError, ValueError):
        return []


def _decoder(file: Path) -> Decode | None:
    """None where the file cannot be read: the page then shows numbers."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises bare Exceptions
        return None
    # A token beyond the vocabulary has no text.
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


SHADES = 10
"""Shades on each side of the middle."""
TOKENS_ON_A_PAGE = 12_000
"""Tokens shown at most, over all critics: about 120 bytes each."""

REASONS = {
    "worst": "Furthest off",
    "best": "Closest",
    "swing": "Value moves most",
    "drawn": "Random sample",
}


@dataclass(frozen=True, slots=True)
class Token:
    """A token on the page: its text, the class of its shade (empty for none), and its figures as a tooltip."""

    text: str
    shade: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A rollout on the page.

    Attributes:
        reason: why it is shown.
        figures: name -> figure.
        prompt: the text before the response; `cut` says whether more stood before it.
        tokens: the response.
        rest: number of tokens beyond those that are recorded.
        svg: value, old value and return along the response.
        command: shows the rollouts of its prompt group in the terminal; empty where there is none.
    """

    reason: str
    figures: dict[str, Cell]
    prompt: str
    cut: bool
    tokens: Sequence[Token]
    rest: int
    svg: str
    has_old_values: bool
    command: str


@dataclass(frozen=True, slots=True)
class Scale:
    """From value to shade: the middle has none, `span` away from it the shade is full."""

    middle: float
    span: float

    def shade(self, value: float) -> str:
        """`u1` to `u10` above the middle, `d1` to `d10` below, `m` at it."""
        step = round(SHADES * (value - self.middle) / self.span) if self.span else 0
        step = max(-SHADES, min(SHADES, step))
        return f"{'u' if step > 0 else 'd'}{abs(step)}" if step else "m"


def extreme_of(examples: Sequence[Record], scale: Scale) -> Cell:
    """The value furthest from the middle."""
    for row in examples:
        for index, value in enumerate(row.get("values")):
            if value is not None and row.get("response_mask")[index] and abs(value - scale.middle) == scale.span:
                return Cell(fixed(value), json.dumps(value), pointer(pointer(row.at, "values"), index))
    return Cell(fixed(None))


def scale_of(examples: Sequence[Record], mean_value: float | None) -> Scale:
    """A scale about the critic's mean value, so that changes of the value show and not its offset from the return."""
    shown = [v for row in examples for v, m in zip(row.get("values"), row.get("response_mask"), strict=True) if m]
    shown = [value for value in shown if value is not None]
    if not shown:
        return Scale(0.0, 0.0)
    middle = sum(shown) / len(shown) if mean_value is None else mean_value
    return Scale(middle, max(abs(value - middle) for value in shown))


def readings(critic: PageCritic, decode: Decode | None, scale: Scale, budget: int) -> list[Reading]:
    """A critic's rollouts to read, as many as the page has room for, each reason in turn."""
    chosen: list[Reading] = []
    for number, row in enumerate(_in_turn(critic.examples)):
        budget -= len(row.get("input_ids"))
        if chosen and budget < 0:
            break
        chosen.append(_reading(critic, number, row, decode, scale))
    order = list(REASONS.values())
    return sorted(chosen, key=lambda reading: order.index(reading.reason))


def _in_turn(examples: Sequence[Record]) -> list[Record]:
    """The first of each reason, then the second of each, and so on."""
    of_reason: dict[str, int] = {}
    ranked = []
    for row in examples:
        why = row.get("why")
        if why in REASONS and row.get("input_ids"):
            of_reason[why] = of_reason.get(why, 0) + 1
            ranked.append((of_reason[why], row))
    return [row for _, row in sorted(ranked, key=lambda entry: entry[0])]


def _reading(critic: PageCritic, number: int, row: Record, decode: Decode | None, scale: Scale) -> Reading:
    ids, mask = row.get("input_ids"), row.get("response_mask")
    texts = token_texts(ids, decode)
    first = mask.index(True)
    values, returns, old = row.get("values"), row.get("returns"), row.get("old_values")
    tokens = []
    for i in range(first, len(ids)):
        if not mask[i] or values[i] is None:
            tokens.append(Token(texts[i], "", ""))
            continue
        title = f"value {fixed(values[i])}, return {fixed(returns[i])}"
        title += f", old value {fixed(old[i])}" if old else ""
        title += "" if decode else f", token {ids[i]}"
        tokens.append(Token(texts[i], scale.shade(values[i]), title))
    figures = {
        "mean value": row.cell("mean_value"),
        "mean return": row.cell("mean_return"),
        "MSE": row.cell("mse", three),
        "row": row.cell("row", str),
    }
    if row.get("uid") is not None:
        figures["prompt group"] = row.cell("uid", str)
    return Reading(
        reason=REASONS[row.get("why")],
        figures=figures,
        prompt="".join(texts[:first]),
        cut=bool(row.get("shown_from")),
        tokens=tokens,
        rest=row.get("tokens") - row.get("shown_from") - len(ids),
        svg=_value_chart(f"reading-{critic.number}-{number}", critic.colour, row),
        has_old_values=bool(old),
        command="" if row.get("uid") is None else show_command(critic.source, critic.key, str(row.get("uid"))),
    )


def _value_chart(name: str, own_colour: str, row: Record) -> str:
    """Value, old value and return along the response."""
    mask = row.get("response_mask")

    def along(key: str) -> list[Any]:
        return [x for x, masked in zip(row.get(key) or [], mask, strict=False) if masked]

    def draw(axes: "Axes") -> None:
        for key, style in (("returns", "group-mean"), ("old_values", "stored"), ("values", own_colour)):
            line = dash(style) if key == "old_values" else "solid"
            up = [float("nan") if y is None else y for y in along(key)]
            marker = "o" if len(up) == 1 else None
            axes.plot(range(1, len(up) + 1), up, color=colour(style), linestyle=line, linewidth=1.5, marker=marker)
        axes.margins(y=0.12)

    return svg(draw, name=name, described="Value and return along the response", height=LOW, integer_ticks=True)
