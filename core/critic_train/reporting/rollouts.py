"""Rollouts to read: each token of the response shaded by its value."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from critic_train.figures import fixed, three
from critic_train.reporting.drawing import LOW, dash, ink, svg
from critic_train.reporting.pieces import Decode, pieces
from critic_train.reporting.records import Cell, Record, pointer
from critic_train.reporting.subjects import Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = 10
"""Shades on each side of the middle."""
TOKENS_ON_A_PAGE = 12_000
"""Tokens shown at most, over all critics: about 120 bytes each."""

REASONS = {
    "worst": "Furthest off",
    "best": "Closest",
    "swing": "Value moves most",
    "drawn": "Drawn by lot",
}


@dataclass(frozen=True, slots=True)
class Token:
    """A token on the page: its text, the class of its shade (empty for none), and its figures in words."""

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
        rest: tokens of the response beyond what was kept.
        svg: value, old value and return along the response.
    """

    reason: str
    figures: dict[str, Cell]
    prompt: str
    cut: bool
    tokens: Sequence[Token]
    rest: int
    svg: str
    has_old_values: bool


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
        for place, value in enumerate(row.get("values")):
            if value is not None and row.get("response_mask")[place] and abs(value - scale.middle) == scale.span:
                return Cell(fixed(value), json.dumps(value), pointer(pointer(row.at, "values"), place))
    return Cell(fixed(None))


def scale_of(examples: Sequence[Record], mean_value: float | None) -> Scale:
    """A scale about the critic's mean value: what moves it, not how far off it is on the whole, is to be seen."""
    shown = [v for row in examples for v, m in zip(row.get("values"), row.get("response_mask"), strict=True) if m]
    shown = [value for value in shown if value is not None]
    if not shown:
        return Scale(0.0, 0.0)
    middle = sum(shown) / len(shown) if mean_value is None else mean_value
    return Scale(middle, max(abs(value - middle) for value in shown))


def readings(subject: Subject, decode: Decode | None, scale: Scale, budget: int) -> list[Reading]:
    """A critic's rollouts to read, as many as the page has room for, each reason in turn."""
    found: list[Reading] = []
    for number, row in enumerate(_in_turn(subject.examples)):
        budget -= len(row.get("input_ids"))
        if found and budget < 0:
            break
        found.append(_reading(subject, number, row, decode, scale))
    order = list(REASONS.values())
    return sorted(found, key=lambda reading: order.index(reading.reason))


def _in_turn(examples: Sequence[Record]) -> list[Record]:
    """The first of each reason, then the second of each, and so on."""
    of_reason: dict[str, int] = {}
    placed = []
    for row in examples:
        why = row.get("why")
        if why in REASONS and row.get("input_ids"):
            of_reason[why] = of_reason.get(why, 0) + 1
            placed.append((of_reason[why], row))
    return [row for _, row in sorted(placed, key=lambda entry: entry[0])]


def _reading(subject: Subject, number: int, row: Record, decode: Decode | None, scale: Scale) -> Reading:
    ids, mask = row.get("input_ids"), row.get("response_mask")
    texts = pieces(ids, decode)
    first = mask.index(True)
    values, returns, old = row.get("values"), row.get("returns"), row.get("old_values")
    tokens = []
    for place in range(first, len(ids)):
        if not mask[place] or values[place] is None:
            tokens.append(Token(texts[place], "", ""))
            continue
        title = f"value {fixed(values[place])}, return {fixed(returns[place])}"
        title += f", old value {fixed(old[place])}" if old else ""
        title += "" if decode else f", token {ids[place]}"
        tokens.append(Token(texts[place], scale.shade(values[place]), title))
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
        svg=_course(f"reading-{subject.number}-{number}", subject.ink, row),
        has_old_values=bool(old),
    )


def _course(name: str, colour: str, row: Record) -> str:
    """Value, old value and return along the response."""
    mask = row.get("response_mask")

    def along(key: str) -> list[Any]:
        return [x for x, masked in zip(row.get(key) or [], mask, strict=False) if masked]

    def draw(axes: "Axes") -> None:
        for key, style in (("returns", "group-mean"), ("old_values", "stored"), ("values", colour)):
            line = dash(style) if key == "old_values" else "solid"
            up = [float("nan") if y is None else y for y in along(key)]
            marker = "o" if len(up) == 1 else None
            axes.plot(range(1, len(up) + 1), up, color=ink(style), linestyle=line, linewidth=1.5, marker=marker)
        axes.margins(y=0.12)

    return svg(draw, name=name, described="Value and return along the response", height=LOW, whole_steps=True)
