"""Charts with a row for each critic, baseline or value of a column."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from critic_train.figures import count, signed, three
from critic_train.reporting.drawing import Chart, Key, in_chart, ink, name_row, svg
from critic_train.reporting.series import heading
from critic_train.reporting.subjects import INK_OF, Subject, baselines_of

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
