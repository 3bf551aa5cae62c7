"""Charts as inline SVG, drawn by matplotlib: text stays text, colours are the page's, identifiers are unique on it."""

import io
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

WIDTH, HEIGHT, LOW = 420, 230, 110
CHARACTER = 6.4  # the width of a digit at FONT pixels, on the wide side
FONT = 11
SERIES = 6
NAME_LENGTH = 46
COLOURS = (
    "page",
    "ink",
    "faint",
    "grid",
    "constant",
    "stored",
    "group-mean",
    "fused",
    *(f"series-{i}" for i in range(1, SERIES + 1)),
)
"""The page's colours. Its style sheet gives each a value for light and one for dark."""

# Matplotlib knows no CSS variables: each colour is drawn as a marker, which `_for_the_page` replaces by its variable.
_MARKERS = {name: f"#fe{number:02x}a7" for number, name in enumerate(COLOURS)}
DASHES: dict[str, Any] = {
    "constant": (0, (1, 2)),
    "stored": (0, (5, 2)),
    "group-mean": (0, (6, 2, 1, 2)),
    "fused": (0, (2, 1)),
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "critic-train",
    "font.family": "DejaVu Sans",
    "font.size": FONT,
    "figure.dpi": 72,
    "savefig.dpi": 72,
    "path.simplify": True,
    "axes.unicode_minus": False,
    "text.parse_math": False,  # a name may hold dollar signs
}


def colour(name: str) -> str:
    """The colour to draw with, for one of COLOURS."""
    return _MARKERS[name]


def dash(name: str) -> Any:
    """The line style of a series: baselines differ in it as well as in colour."""
    return DASHES.get(name, "solid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An entry of a chart's legend.

    Attributes:
        text: what it names.
        ink: its colour, one of COLOURS.
        mark: "line", "point", "area", or the dash of a baseline.
    """

    text: str
    colour: str
    mark: str = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawn chart.

    Attributes:
        title: what it shows, above it.
        svg: the drawing.
        note: one or two sentences on how to read it.
        keys: its legend; none where the title says it all.
        table: the figures behind it, headings first; cells are `Cell`s or texts.
    """

    title: str
    svg: str
    note: str = ""
    keys: Sequence[Key] = ()
    table: "Sequence[Sequence[Any]]" = field(default_factory=list)


@contextmanager
def page_style() -> "Iterator[None]":
    """Draw in the page's style; silences matplotlib's warnings about fonts and caches."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            yield
    finally:
        log.setLevel(level)


def svg(
    draw: "Callable[[Axes], None]",
    *,
    name: str,
    described: str,
    x_label: str = "",
    width: int = WIDTH,
    height: int = HEIGHT,
    integer_ticks: bool = False,
    y_labels: bool = True,
) -> str:
    """Draw one chart.

    Args:
        draw: draws on the axes it is given, and sets its limits.
        name: unique on the page; made part of every identifier.
        described: the chart as a sentence, for screen readers.
        x_label: what runs along the bottom.
        width, height: in CSS pixels at its natural size.
        integer_ticks: the x axis counts something, so it has ticks at integers only.
        y_labels: whether the y axis has ticks.
    """
    with page_style():
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        _bare(axes)
        draw(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5 if height > LOW else 4, integer=integer_ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        left = 8.0
        if y_labels:
            if axes.get_yscale() == "linear":
                axes.yaxis.set_major_locator(MaxNLocator(5 if height > LOW else 2))
            axes.yaxis.set_major_formatter(FuncFormatter(_tick))
            axes.yaxis.set_minor_formatter(NullFormatter())
            low, high = sorted(axes.get_ylim())
            shown = [y for y in axes.yaxis.get_majorticklocs() if low <= y <= high]
            left = 10 + CHARACTER * max((len(_tick(y, None)) for y in shown), default=1)
        else:
            axes.yaxis.set_ticks([])
        bottom = 40 if x_label else 24
        right = 8 + CHARACTER * 2.5  # half of the widest last label
        across, up = width - left - right, height - bottom - 8
        axes.set_position((left / width, bottom / height, across / width, up / height))
        if x_label:
            axes.set_xlabel(x_label, labelpad=4)
        written = io.StringIO()
        figure.set_canvas(FigureCanvasSVG(figure))
        figure.savefig(written, format="svg", metadata={"Date": None})
    return _for_the_page(written.getvalue(), name, described)


def in_chart(text: str, *, from_end: bool = False) -> str:
    """A name from the data or of a path, made printable and not too long.

    Args:
        text: the name.
        from_end: keep its end, as of a path, and not its beginning.
    """
    printable = "".join(c if c.isprintable() else "?" for c in text)
    if len(printable) <= NAME_LENGTH:
        return printable
    return "..." + printable[3 - NAME_LENGTH :] if from_end else printable[: NAME_LENGTH - 3] + "..."


def name_row(axes: "Axes", y: float, name: str) -> None:
    """Write a row's name just above it, at the left end; no line shows through it."""
    behind = {"facecolor": colour("page"), "edgecolor": "none", "pad": 1.5}
    where = axes.get_yaxis_transform()
    axes.text(0, y - 0.2, name, transform=where, color=colour("ink"), va="bottom", bbox=behind, zorder=4)


def _bare(axes: "Axes") -> None:
    """Axes with no box, faint lines across, and labels in the text's colour."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colour("faint"))
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    axes.tick_params(length=0, colors=colour("ink"), pad=4)
    axes.xaxis.label.set_color(colour("ink"))
    axes.grid(axis="y", color=colour("grid"), linewidth=0.8)
    axes.set_axisbelow(True)


def _tick(value: float, _: object) -> str:
    """A tick's label: `0.25`, `1e-05`, `20k`."""
    for unit, one in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * one or (abs(value) >= one and value % one == 0 and one > 1e3):
            return f"{value / one:.4g}{unit}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _for_the_page(text: str, name: str, described: str) -> str:
    """Turn matplotlib's SVG document into an element of the page."""
    from html import escape

    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    head = re.search(r'viewBox="([^"]*)"', text)
    assert head is not None, "matplotlib writes a viewBox"
    body = text[text.index(">") + 1 :]
    # Of matplotlib's identifiers only those are needed that clips and markers refer to.
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', body))

    def rewritten(tag: re.Match[str]) -> str:
        """One tag; what stands between tags is text from the data and stays as it is."""
        inner = re.sub(r"\s+", " ", tag[0])
        # Identifiers and references to them get the chart's name, so that they are unique on the page.
        inner = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", inner)
        inner = re.sub(r'(url\(#|href="#)([\w.-]+)', rf"\g<1>{name}-\g<2>", inner).replace("xlink:href", "href")
        # The family is the page's own.
        inner = re.sub(r"font: (?:[\w ]*? )?([\d.]+)px [^;\"]*", r"font-size: \1px", inner)
        inner = re.sub(r'(?<= )(?:d|x|y|transform)="[^"]*"', _rounded, inner)
        for key, marker in _MARKERS.items():
            inner = inner.replace(marker, f"var(--{key})")
        return inner.replace(' "', '"')

    body = re.sub(r">\s+<", "><", re.sub(r"<[^>]*>", rewritten, body)).strip()
    return f'<svg viewBox="{head[1]}" role="img" aria-label="{escape(described, quote=True)}">{body}'


def _rounded(coordinates: re.Match[str]) -> str:
    """Coordinates to a tenth of a pixel, which is enough on the page and half the size."""
    return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), coordinates[0])
