"""Charts with a row for each critic, baseline or value of a column.

Charts of where critics are right and where not: by value, by position and by length of the response.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from critic_train.report.compared_critics import (
    BASELINES,
    INK_OF,
    Subject,
    baselines_of,
    heading,
    keys_of,
    middles,
    per_cent,
    table_of,
    with_rows,
)
from critic_train.report.report_sources import Record
from critic_train.report.svg_charts import Chart, Key, dash, in_chart, ink, name_row, svg
from critic_train.text import count, fixed, signed, three

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_HEIGHT, ABOVE_AND_BELOW = 40, 32


def verdict_charts(subjects: Sequence[Subject]) -> list[Chart]:
    """Explained variance beside the baselines, over all and within prompts."""
    charts = [
        _whiskers(subjects, "explained_variance", "Explained variance", "verdict-ev"),
        _whiskers(subjects, "explained_variance_within_group", "Within prompts", "verdict-within"),
    ]
    return [chart for chart in charts if chart is not None]


def _whiskers(subjects: Sequence[Subject], key: str, title: str, name: str) -> Chart | None:
    """A row for each critic and baseline: the figure as a point, its interval as a line."""
    rows = [(subject.name, subject.ink, subject.metrics) for subject in subjects]
    rows += [(label, INK_OF[baseline], metrics) for label, baseline, metrics in baselines_of(subjects)]
    rows = [row for row in rows if row[2].get(key) is not None]
    if not rows or not any(subject.metrics.get(key) is not None for subject in subjects):
        return None

    def draw(axes: "Axes") -> None:
        for place, (label, colour, metrics) in enumerate(rows):
            bounds = metrics.get(f"{key}_interval")
            if bounds:
                axes.plot(bounds, [place, place], color=ink(colour), linewidth=2.4, solid_capstyle="butt")
            axes.plot([metrics.get(key)], [place], color=ink(colour), marker="o", markersize=7)
            name_row(axes, place, in_chart(label, from_end=True))
        axes.axvline(0, color=ink("faint"), linewidth=1)
        axes.set_ylim(len(rows) - 0.6, -0.65)
        axes.margins(x=0.08)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=ink("grid"), linewidth=0.8)

    drawing = svg(
        draw,
        name=name,
        described=f"{title} of each critic and baseline with its interval",
        height=ROW_HEIGHT * len(rows) + ABOVE_AND_BELOW,
        y_labels=False,
    )
    table = [["", "explained variance", "95 % interval"]]
    table += [[label, metrics.cell(key), metrics.bounds(f"{key}_interval")] for label, _, metrics in rows]  # type: ignore[list-item]
    note = "0 is a constant guess, 1 is perfect. Lines: 95 % intervals over prompt groups."
    if key.endswith("within_group"):
        note = "The same with each prompt group's own mean taken out: what a critic knows beyond the prompt."
    return Chart(title=title, svg=drawing, note=note, table=table)


def columns_of(subjects: Sequence[Subject]) -> list[str]:
    """The columns that the rollouts were judged by."""
    return list(subjects[0].metrics.part("by").parts()) if subjects else []


def by_column(subjects: Sequence[Subject], column: str) -> Chart | None:
    """Explained variance for each value of a column, the largest twelve."""
    key, most = "explained_variance", 12
    first = subjects[0].metrics.part("by").part(column).parts()
    labels = sorted(first, key=lambda label: -(first[label].get("tokens") or 0))
    shown = labels[:most]
    if not any(first[label].get(key) is not None for label in shown):
        return None

    def draw(axes: "Axes") -> None:
        for place, label in enumerate(shown):
            for subject in subjects:
                figure = subject.metrics.part("by").part(column).part(label).get(key)
                if figure is not None:
                    axes.plot([0, figure], [place, place], color=ink(subject.ink), linewidth=1.2, alpha=0.5)
                    axes.plot([figure], [place], color=ink(subject.ink), marker="o", markersize=6)
            name_row(axes, place, in_chart(label))
        axes.axvline(0, color=ink("faint"), linewidth=1)
        axes.set_ylim(len(shown) - 0.6, -0.65)
        axes.margins(x=0.08)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=ink("grid"), linewidth=0.8)

    table: list[list[Any]] = [[column, "rollouts", "tokens", "explained variance", "within prompts", "MSE", "bias"]]
    for subject in subjects:
        table += heading(subject, subjects, 7)
        rows = subject.metrics.part("by").part(column)
        for label in labels[:100]:
            row = rows.part(label)
            table.append(
                [
                    label,
                    row.cell("rollouts", count),
                    row.cell("tokens", count),
                    row.cell(key),
                    row.cell("explained_variance_within_group"),
                    row.cell("mse", three),
                    row.cell("bias", signed),
                ]
            )
    more = f" The largest {most} of {len(labels)}." if len(labels) > most else ""
    return Chart(
        title=f"Explained variance by {column}",
        svg=svg(
            draw,
            name=f"by-{columns_of(subjects).index(column)}",
            described=f"Explained variance for each value of {column}",
            height=ROW_HEIGHT * len(shown) + ABOVE_AND_BELOW,
            y_labels=False,
        ),
        note=f"Each value's rollouts judged apart.{more}",
        keys=[Key(text=s.name, ink=s.ink) for s in subjects] if len(subjects) > 1 else [],
        table=table,
    )


def where_charts(subjects: Sequence[Subject]) -> list[Chart]:
    """Where critics are right and where they are not."""
    charts = [
        calibration(subjects),
        by_position(subjects),
        auc_by_position(subjects),
        by_length(subjects),
        distribution(subjects),
        *(by_column(subjects, column) for column in columns_of(subjects)),
    ]
    return [chart for chart in charts if chart is not None]


def calibration(subjects: Sequence[Subject]) -> Chart | None:
    """Mean return of tokens with about the same value, against that value."""
    found = with_rows(subjects, "calibration", "mean_value", "mean_return")
    if not found:
        return None
    most = max(row.get("tokens") or 1 for _, rows in found for row in rows)

    def draw(axes: "Axes") -> None:
        ends = [row.get(key) for _, rows in found for row in rows for key in ("mean_value", "mean_return")]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=ink("faint"), linewidth=1)
        for subject, rows in found:
            along = [row.get("mean_value") for row in rows]
            up = [row.get("mean_return") for row in rows]
            for x, row in zip(along, rows, strict=True):
                if row.get("interval"):
                    axes.plot([x, x], row.get("interval"), color=ink(subject.ink), linewidth=1.4, alpha=0.6)
            axes.plot(along, up, color=ink(subject.ink), linewidth=1)
            sizes = [10 + 60 * (row.get("tokens") or 1) / most for row in rows]
            axes.scatter(along, up, s=sizes, color=ink(subject.ink), linewidths=0)

    table = table_of(
        found,
        ["value", "tokens", "rollouts", "mean value", "mean return", "95 % interval"],
        lambda row: [
            f"{fixed(row.get('from'))} to {fixed(row.get('to'))}",
            row.cell("tokens", count),
            row.cell("rollouts", count),
            row.cell("mean_value"),
            row.cell("mean_return"),
            row.bounds("interval"),
        ],
    )
    return Chart(
        title="Calibration: mean return of tokens by value",
        svg=svg(draw, name="calibration", described="Mean return against predicted value", x_label="predicted value"),
        note="On the grey line a value is the mean return of the tokens it is given to; below it, values are too high. "
        "Larger points stand for more tokens.",
        keys=keys_of(found),
        table=table,
    )


def by_position(subjects: Sequence[Subject]) -> Chart | None:
    """Explained variance along the response, beside the baselines that vary along it."""
    key = "explained_variance"
    found = with_rows(subjects, "by_position", key)
    if not found:
        return None
    baselines = {} if len(found) > 1 else found[0][0].judged()
    lines = {name: metrics.rows("by_position") for name, metrics in baselines.items() if name != "constant"}
    lines = {name: rows for name, rows in lines.items() if rows and all(row.get(key) is not None for row in rows)}

    def draw(axes: "Axes") -> None:
        for name, rows in lines.items():
            style = INK_OF[name]
            axes.plot(middles(rows), [row.get(key) for row in rows], color=ink(style), linestyle=dash(style))
        for subject, rows in found:
            up = [row.get(key) for row in rows]
            axes.plot(middles(rows), up, color=ink(subject.ink), linewidth=1.8, marker="o", markersize=4)
        axes.axhline(0, color=ink("faint"), linewidth=0.8)
        axes.set_xlim(0, 100)

    table = table_of(
        found,
        ["part", "tokens", "explained variance", "mean value", "mean return", "MSE", "bias"],
        lambda row: [
            per_cent(row),
            row.cell("tokens", count),
            row.cell(key),
            row.cell("mean_value"),
            row.cell("mean_return"),
            row.cell("mse", three),
            row.cell("bias", signed),
        ],
    )
    return Chart(
        title="Explained variance along the response",
        svg=svg(
            draw, name="position", described="Explained variance by part of the response", x_label="% of the response"
        ),
        note="A critic that watches the response explains more towards its end.",
        keys=keys_of(found, alone="this critic")
        + [Key(text=BASELINES[n], ink=INK_OF[n], mark=INK_OF[n]) for n in lines],
        table=table,
    )


def auc_by_position(subjects: Sequence[Subject]) -> Chart | None:
    """How surely a right rollout gets the higher value of two from one prompt, along the response."""
    key = "auc_within_group"
    found = with_rows(subjects, "auc_by_position", key)
    if not found:
        return None

    def draw(axes: "Axes") -> None:
        for subject, rows in found:
            banded = [row for row in rows if row.get("interval")]
            bounds = [row.get("interval") for row in banded]
            low, high = [b[0] for b in bounds], [b[1] for b in bounds]
            axes.fill_between(middles(banded), low, high, color=ink(subject.ink), alpha=0.15, linewidth=0)
            up = [row.get(key) for row in rows]
            axes.plot(middles(rows), up, color=ink(subject.ink), linewidth=1.8, marker="o", markersize=4)
        axes.axhline(0.5, color=ink("faint"), linewidth=0.8)
        axes.set_xlim(0, 100)

    table = table_of(
        found,
        ["part", "pairs", "AUC within prompts", "95 % interval"],
        lambda row: [per_cent(row), row.cell("pairs", count), row.cell(key), row.bounds("interval")],
    )
    return Chart(
        title="From where on it tells right from wrong",
        svg=svg(draw, name="auc", described="AUC within prompts by part of response", x_label="% of the response"),
        note="AUC within prompt groups: how often the better of two rollouts of a prompt has the higher value. "
        "0.5 is a coin.",
        keys=keys_of(found),
        table=table,
    )


def by_length(subjects: Sequence[Subject]) -> Chart | None:
    """Explained variance by the length of the response."""
    key = "explained_variance"
    found = with_rows(subjects, "by_length", key)
    if not found:
        return None

    def draw(axes: "Axes") -> None:
        for subject, rows in found:
            middles = [(row.get("from") + row.get("to")) / 2 for row in rows]
            up = [row.get(key) for row in rows]
            axes.plot(middles, up, color=ink(subject.ink), linewidth=1.8, marker="o", markersize=4)
        axes.axhline(0, color=ink("faint"), linewidth=0.8)

    table = table_of(
        found,
        ["response tokens", "rollouts", "tokens", "explained variance", "MSE", "bias"],
        lambda row: [
            f"{row.get('from'):,} to {row.get('to'):,}",
            row.cell("rollouts", count),
            row.cell("tokens", count),
            row.cell(key),
            row.cell("mse", three),
            row.cell("bias", signed),
        ],
    )
    return Chart(
        title="Explained variance by length of the response",
        svg=svg(draw, name="length", described="Explained variance by length", x_label="tokens of the response"),
        keys=keys_of(found),
        table=table,
    )


def distribution(subjects: Sequence[Subject]) -> Chart | None:
    """How values and returns are spread."""
    found = [(subject, subject.metrics.part("value_histogram")) for subject in subjects]
    found = [(subject, histogram) for subject, histogram in found if histogram.get("counts")]
    if not found:
        return None
    returns = found[0][0].verdict.part("return_histogram")

    def draw(axes: "Axes") -> None:
        if returns.get("counts"):
            edges, shares = _shares(returns)
            axes.stairs(shares, edges, color=ink("group-mean"), fill=True, alpha=0.3)
        for subject, histogram in found:
            edges, shares = _shares(histogram)
            axes.stairs(shares, edges, color=ink(subject.ink), linewidth=1.6)
        axes.set_ylim(bottom=0)

    keys = [Key(text=f"values of {s.name}" if len(found) > 1 else "values", ink=s.ink) for s, _ in found]
    if returns.get("counts"):
        keys.append(Key(text="returns", ink="group-mean", mark="area"))
    return Chart(
        title="Values and returns: share of tokens",
        svg=svg(draw, name="spread", described="Histograms of values and returns", x_label="value or return"),
        note="Values closer together than the returns are what a careful critic gives.",
        keys=keys,
    )


def _shares(histogram: Record) -> tuple[list[float], list[float]]:
    """Edges, and the share of tokens in each bin."""
    counts = histogram.get("counts")
    total = sum(counts) or 1
    return histogram.get("edges"), [number / total for number in counts]
