"""Charts of where critics are right and where not: by value, by position and by length of the response."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from critic_train.figures import count, fixed, signed, three
from critic_train.reporting.drawing import Chart, Key, dash, ink, svg
from critic_train.reporting.records import Record
from critic_train.reporting.series import keys_of, middles, per_cent, table_of, with_rows
from critic_train.reporting.subjects import BASELINES, INK_OF, Subject
from critic_train.reporting.whiskers import by_column, columns_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
