"""Charts of a verdict: critics beside baselines, and where critics are good and where they are not."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from critic_train.evaluation import metrics
from critic_train.report.compared_critics import (
    BASELINE_COLOURS,
    PageCritic,
    baseline_key,
    baselines_of,
    legend,
    table_of,
    with_series,
)
from critic_train.report.report_sources import Record
from critic_train.report.svg_charts import Chart, Key, colour, dash, in_chart, name_row, svg
from critic_train.report.verdict_model import (
    INTERVAL,
    MAIN,
    MEAN_RETURN,
    MEAN_VALUE,
    PAIRS,
    ROLLOUTS,
    TOKENS,
    WITHIN,
    Column,
    Series,
    auc_series,
    calibration_series,
    label_rows,
    length_series,
    metric_column,
    part_of_response,
    position_series,
    table_columns,
    text_column,
)
from critic_train.report.worth_chart import worth_chart
from critic_train.text import fixed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_HEIGHT, ABOVE_AND_BELOW = 40, 32
LABELS_DRAWN, LABELS_LISTED = 12, 100
"""Values of a column in its chart, and in the table below it."""
PART = text_column("part", part_of_response)


def verdict_charts(critics: Sequence[PageCritic]) -> list[Chart]:
    """Explained variance beside the baselines, over all and within prompts; and the worth in rollouts."""
    charts = [
        _interval_chart(critics, MAIN, "Explained variance", "verdict-ev"),
        _interval_chart(critics, WITHIN, "Within prompts", "verdict-within"),
        worth_chart(critics),
    ]
    return [chart for chart in charts if chart is not None]


def _interval_chart(critics: Sequence[PageCritic], key: str, title: str, name: str) -> Chart | None:
    """A row for each critic and baseline: the figure as a point, its interval as a line."""
    rows = [(critic.name, critic.colour, critic.metrics) for critic in critics]
    rows += [(label, BASELINE_COLOURS[baseline], record) for label, baseline, record in baselines_of(critics)]
    rows = [row for row in rows if row[2].get(key) is not None]
    if not rows or not any(critic.metrics.get(key) is not None for critic in critics):
        return None

    def draw(axes: "Axes") -> None:
        for y, (label, row_colour, record) in enumerate(rows):
            bounds = record.get(f"{key}_interval")
            if bounds:
                axes.plot(bounds, [y, y], color=colour(row_colour), linewidth=2.4, solid_capstyle="butt")
            axes.plot([record.get(key)], [y], color=colour(row_colour), marker="o", markersize=7)
            name_row(axes, y, in_chart(label, from_end=True))
        _rows_on_a_scale(axes, len(rows))

    table: list[list[object]] = [["", "explained variance", "95 % interval"]]
    table += [[label, record.cell(key), record.bounds(f"{key}_interval")] for label, _, record in rows]
    note = "0 is a constant guess, 1 is perfect. Lines: 95 % intervals over prompt groups."
    if key == WITHIN:
        note = "The same with each prompt group's own mean taken out: what a critic knows beyond the prompt."
    described = f"{title} of each critic and baseline with its interval"
    return Chart(title=title, svg=_row_drawing(draw, name, described, len(rows)), note=note, table=table)


def _rows_on_a_scale(axes: "Axes", rows: int) -> None:
    """Axes of a chart with a row for each name."""
    axes.axvline(0, color=colour("faint"), linewidth=1)
    axes.set_ylim(rows - 0.6, -0.65)
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=colour("grid"), linewidth=0.8)


def _row_drawing(draw: "Callable[[Axes], None]", name: str, described: str, rows: int) -> str:
    height = ROW_HEIGHT * rows + ABOVE_AND_BELOW
    return svg(draw, name=name, described=described, height=height, y_labels=False)


def label_columns(critics: Sequence[PageCritic]) -> list[str]:
    """The columns that the rollouts were judged by."""
    return list(critics[0].metrics.part("by").parts()) if critics else []


def by_column(critics: Sequence[PageCritic], column: str) -> Chart | None:
    """Explained variance for each value of a column, the largest LABELS_DRAWN."""
    rows = [(critic, label_rows(critic.metrics, column)) for critic in critics]
    labels = list(rows[0][1])
    shown = labels[:LABELS_DRAWN]
    if not any(rows[0][1][label].get(MAIN) is not None for label in shown):
        return None

    def draw(axes: "Axes") -> None:
        for y, label in enumerate(shown):
            for critic, of_label in rows:
                figure = of_label[label].get(MAIN) if label in of_label else None
                if figure is not None:
                    axes.plot([0, figure], [y, y], color=colour(critic.colour), linewidth=1.2, alpha=0.5)
                    axes.plot([figure], [y], color=colour(critic.colour), marker="o", markersize=6)
            name_row(axes, y, in_chart(label))
        _rows_on_a_scale(axes, len(shown))

    listed = [
        (critic, [critic.metrics.part("by").part(column).part(label) for label in labels[:LABELS_LISTED]])
        for critic, _ in rows
    ]
    every = [row for _, of_critic in listed for row in of_critic]
    label_at = {row.at: label for _, of_critic in listed for row, label in zip(of_critic, labels, strict=False)}
    columns = [text_column(column, lambda row: label_at[row.at]), ROLLOUTS, TOKENS]
    columns += [c for c in table_columns("by") if not (c.optional and c.is_empty(every))]
    more = f" The largest {LABELS_DRAWN} of {len(labels)}." if len(labels) > LABELS_DRAWN else ""
    name = f"by-{label_columns(critics).index(column)}"
    return Chart(
        title=f"Explained variance by {column}",
        svg=_row_drawing(draw, name, f"Explained variance for each value of {column}", len(shown)),
        note=f"Each value's rollouts judged apart.{more}",
        keys=legend(critics),
        table=table_of(listed, columns),
    )


def where_charts(critics: Sequence[PageCritic]) -> list[Chart]:
    """Where critics are good and where they are not."""
    charts = [
        calibration(critics),
        by_position(critics),
        auc_by_position(critics),
        by_length(critics),
        distribution(critics),
        *(by_column(critics, column) for column in label_columns(critics)),
    ]
    return [chart for chart in charts if chart is not None]


def _rows(shown: Sequence[tuple[PageCritic, Series]]) -> list[tuple[PageCritic, Sequence[Record]]]:
    return [(critic, series.rows) for critic, series in shown]


def _curve(axes: "Axes", critic: PageCritic, series: Series) -> None:
    axes.plot(series.x, series.y, color=colour(critic.colour), linewidth=1.8, marker="o", markersize=4)


def calibration(critics: Sequence[PageCritic]) -> Chart | None:
    """Mean return of tokens with about the same value, against that value."""
    shown = with_series(critics, calibration_series)
    if not shown:
        return None
    most = max(row.get("tokens") or 1 for _, series in shown for row in series.rows)

    def draw(axes: "Axes") -> None:
        ends = [end for _, series in shown for end in (*series.x, *series.y)]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=colour("faint"), linewidth=1)
        for critic, series in shown:
            for x, bounds in zip(series.x, series.intervals, strict=True):
                if bounds:
                    axes.plot([x, x], bounds, color=colour(critic.colour), linewidth=1.4, alpha=0.6)
            axes.plot(series.x, series.y, color=colour(critic.colour), linewidth=1)
            sizes = [10 + 60 * (row.get("tokens") or 1) / most for row in series.rows]
            axes.scatter(series.x, series.y, s=sizes, color=colour(critic.colour), linewidths=0)

    value = text_column("value", lambda row: f"{fixed(row.get('from'))} to {fixed(row.get('to'))}")
    return Chart(
        title="Calibration: mean return of tokens by value",
        svg=svg(draw, name="calibration", described="Mean return against predicted value", x_label="predicted value"),
        note="On the grey line a value is the mean return of the tokens it is given to; below it, values are too high. "
        "Larger points stand for more tokens.",
        keys=legend([critic for critic, _ in shown]),
        table=table_of(_rows(shown), [value, TOKENS, ROLLOUTS, MEAN_VALUE, MEAN_RETURN, INTERVAL]),
    )


def by_position(critics: Sequence[PageCritic]) -> Chart | None:
    """Explained variance along the response, beside the baselines that vary along it."""
    shown = with_series(critics, position_series)
    if not shown:
        return None
    baselines = {} if len(shown) > 1 else shown[0][0].judged_baselines()
    lines = {name: position_series(record) for name, record in baselines.items() if name != "constant"}
    # A baseline without a figure for some part is left out.
    lines = {n: line for n, line in lines.items() if line and len(line.x) == len(baselines[n].rows("by_position"))}

    def draw(axes: "Axes") -> None:
        for name, line in lines.items():
            style = BASELINE_COLOURS[name]
            axes.plot(line.x, line.y, color=colour(style), linestyle=dash(style))
        for critic, series in shown:
            _curve(axes, critic, series)
        axes.axhline(0, color=colour("faint"), linewidth=0.8)
        axes.set_xlim(0, 100)

    main, *others = table_columns("by_position")
    drawing = svg(
        draw, name="position", described="Explained variance by part of the response", x_label="% of the response"
    )
    return Chart(
        title="Explained variance along the response",
        svg=drawing,
        note="A critic that watches the response explains more towards its end.",
        keys=legend([critic for critic, _ in shown], alone="this critic") + [baseline_key(name) for name in lines],
        table=table_of(_rows(shown), [PART, TOKENS, main, MEAN_VALUE, MEAN_RETURN, *others]),
    )


def auc_by_position(critics: Sequence[PageCritic]) -> Chart | None:
    """AUC within prompts along the response."""
    shown = with_series(critics, auc_series)
    if not shown:
        return None

    def draw(axes: "Axes") -> None:
        for critic, series in shown:
            banded = [(x, bounds) for x, bounds in zip(series.x, series.intervals, strict=True) if bounds]
            low, high = [bounds[0] for _, bounds in banded], [bounds[1] for _, bounds in banded]
            axes.fill_between([x for x, _ in banded], low, high, color=colour(critic.colour), alpha=0.15, linewidth=0)
            _curve(axes, critic, series)
        axes.axhline(0.5, color=colour("faint"), linewidth=0.8)
        axes.set_xlim(0, 100)

    auc = metric_column(metrics.metric_named("auc_within_group"))
    return Chart(
        title="From where on it tells right from wrong",
        svg=svg(draw, name="auc", described="AUC within prompts by part of response", x_label="% of the response"),
        note="AUC within prompt groups: how often the better of two rollouts of a prompt has the higher value. "
        "0.5 is a coin.",
        keys=legend([critic for critic, _ in shown]),
        table=table_of(_rows(shown), [PART, PAIRS, auc, INTERVAL]),
    )


def by_length(critics: Sequence[PageCritic]) -> Chart | None:
    """Explained variance by the length of the response."""
    shown = with_series(critics, length_series)
    if not shown:
        return None

    def draw(axes: "Axes") -> None:
        for critic, series in shown:
            _curve(axes, critic, series)
        axes.axhline(0, color=colour("faint"), linewidth=0.8)

    lengths = text_column("response tokens", lambda row: f"{row.get('from'):,} to {row.get('to'):,}")
    columns: list[Column] = [lengths, ROLLOUTS, TOKENS, *table_columns("by_length")]
    return Chart(
        title="Explained variance by length of the response",
        svg=svg(draw, name="length", described="Explained variance by length", x_label="tokens of the response"),
        keys=legend([critic for critic, _ in shown]),
        table=table_of(_rows(shown), columns),
    )


def distribution(critics: Sequence[PageCritic]) -> Chart | None:
    """Histograms of values and returns."""
    shown = [(critic, critic.metrics.part("value_histogram")) for critic in critics]
    shown = [(critic, histogram) for critic, histogram in shown if histogram.get("counts")]
    if not shown:
        return None
    returns = shown[0][0].verdict.part("return_histogram")

    def draw(axes: "Axes") -> None:
        if returns.get("counts"):
            edges, shares = _shares(returns)
            axes.stairs(shares, edges, color=colour("group-mean"), fill=True, alpha=0.3)
        for critic, histogram in shown:
            edges, shares = _shares(histogram)
            axes.stairs(shares, edges, color=colour(critic.colour), linewidth=1.6)
        axes.set_ylim(bottom=0)

    several = len(shown) > 1
    keys = [Key(text=f"values of {c.name}" if several else "values", colour=c.colour) for c, _ in shown]
    if returns.get("counts"):
        keys.append(Key(text="returns", colour="group-mean", mark="area"))
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
