"""The verdict of `eval` as tables of rich: critics beside baselines, then by position in the response and by column."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from critic_train.evaluation.metrics import group_size, metric_named
from critic_train.report.report_sources import Record
from critic_train.report.verdict_model import (
    AUC_WITHIN,
    COMPARISON,
    MAIN,
    MEAN_RETURN,
    MEAN_VALUE,
    ROLLOUTS,
    TOKENS,
    Column,
    Difference,
    baseline_differences,
    counts,
    critic_differences,
    label_rows,
    metric_column,
    policy_columns,
    predictions_of,
    return_figures,
    shown_name,
    table_columns,
    terminal_columns,
)
from critic_train.text import DASH, three

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def new_table(first: str, headings: Sequence[str], *, bare: bool = False) -> "Table":
    """A table whose first column names the row and whose others are figures."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=None if bare else SIMPLE_HEAD, show_header=not bare, show_edge=False, pad_edge=False)
    table.add_column(first, overflow="fold", vertical="top")
    for heading in headings:
        table.add_column(heading, justify="left" if bare else "right", overflow="fold", vertical="bottom")
    return table


def fits(console: "Console", table: "Table") -> bool:
    """Whether the table has room without folding a cell."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width


def first_that_fits(console: "Console", tables: Sequence["Table"]) -> "Table":
    """The first table that has room; where none has, the last, its cells folded."""
    return next((table for table in tables if fits(console, table)), tables[-1])


def in_short(name: str) -> str:
    """A critic's path as a heading: its last two parts, one below the other."""
    parts = [part for part in name.split("/") if part]
    return "/\n".join(parts[-2:]) if "/" in name else name.replace(" ", "\n", 1)


ROWS_SHOWN = 20
"""Values of a --by column, at most."""

Named = list[tuple[str, Record]]
"""Names and metrics of predictions."""


def draw_verdict(console: "Console", result: dict[str, Any]) -> None:
    """Print the verdict: as sentences, then as tables.

    Args:
        console: where.
        result: of `evaluate`; parts that are missing are left out.
    """
    verdict = Record(result, "")
    predictions = predictions_of(verdict)
    if not predictions:
        console.print("Interrupted: nothing was judged.", style="bold")
        return
    draw_sentences(console, verdict.get("words") or [])
    console.print()
    console.print(data_line(verdict), style="dim")
    draw_comparison(console, predictions)
    draw_policy(console, predictions)
    draw_differences(console, verdict)
    critics = verdict.part("critics").parts()
    draw_worth(console, critics)
    if critics:
        draw_positions(console, list(critics.values()), predictions)
        draw_labels(console, critics)


def draw_sentences(console: "Console", sentences: Sequence[str]) -> None:
    """The verdict as sentences, a line each."""
    wide = max(console.width, 12)
    for sentence in sentences:
        console.print(
            textwrap.fill(f"- {sentence}", wide, subsequent_indent="  ", break_on_hyphens=False), style="bold"
        )


def data_line(verdict: Record) -> str:
    """What was judged on."""
    line = ", ".join(f"{cell.text} {name}" for name, cell in counts(verdict))
    returns = {name: cell.text for name, cell in return_figures(verdict).items()}
    if returns:
        line += "; returns {mean} on average, std {std}, from {min} to {max}".format(**returns)
    for what in ("rows", "files"):
        left_out = verdict.part(f"{what}_left_out").get("count")
        line += f"; {left_out:,} {what if left_out > 1 else what[:-1]} left out" if left_out else ""
    return line


def draw_comparison(console: "Console", predictions: Named) -> None:
    """One row a critic and a baseline: in one table, in two where that is too wide, else a block each."""
    parts = [terminal_columns(topics) for topics in COMPARISON]
    every = [column for columns in parts for column in columns]
    for layout in ([every], parts):
        tables = [_table(predictions, columns) for columns in layout]
        if all(fits(console, table) for table in tables):
            for table in tables:
                console.print()
                console.print(table)
            return
    _draw_blocks(console, predictions, every, 18 if console.width >= 45 else 0, spaced=True)


def draw_policy(console: "Console", predictions: Named) -> None:
    """What critics are worth to a policy: the columns and rows with a figure; a block each where that is too wide."""
    columns = [c for c in policy_columns() if not c.is_empty([metrics for _, metrics in predictions])]
    rows = [row for row in predictions if any(not column.is_empty([row[1]]) for column in columns)]
    if not columns:
        return
    table = _table(rows, columns)
    console.print()
    if fits(console, table):
        console.print(table)
    else:
        _draw_blocks(console, rows, columns, 33 if console.width >= 60 else 0, spaced=False)


def _table(predictions: Named, columns: Sequence[Column]) -> "Table":
    table = new_table("", [column.heading for column in columns])
    for name, metrics in predictions:
        table.add_row(name, *(column.cell(metrics).text for column in columns))
    return table


def _draw_blocks(
    console: "Console", predictions: Named, columns: Sequence[Column], margin: int, *, spaced: bool
) -> None:
    """A line for each figure, below the name of its prediction."""
    for name, metrics in predictions:
        if spaced:
            console.print()
        console.print(name, style="bold")
        for column in columns:
            heading = column.heading.replace("\n", " ")
            console.print(f"  {heading:<{margin}} {column.cell(metrics).text}")


def draw_differences(console: "Console", verdict: Record) -> None:
    """By how much explained variance differs, paired: more precise than two intervals side by side."""
    lines: list[tuple[str, Difference]] = []
    critics = verdict.part("critics").parts()
    several = len(critics) > 1
    for name, critic in critics.items():
        lines += [(f"{shown_name(name)} - {shown_name(d.other)}", d) for d in baseline_differences(critic)]
        own = f"{shown_name(name)}, fused" if several else "fused"
        names = {"critic": shown_name(name) + " alone"}
        fused = baseline_differences(critic.part("fused"))
        lines += [(f"{own} - {names.get(d.other, shown_name(d.other))}", d) for d in fused]
    lines += [(d.other if d.is_main else f"  {d.metric}", d) for d in critic_differences(verdict)]
    if not lines:
        return
    console.print("\nDifference of explained variance", style="bold")
    table = new_table("", [""], bare=True)
    for name, difference in lines:
        table.add_row(f"  {name}", f"{difference.difference.text} {difference.interval.text}".rstrip())
    console.print(table)


def draw_worth(console: "Console", critics: dict[str, Record]) -> None:
    """The variance of advantages by rollouts a prompt: with GRPO's baseline, with each critic alone, and fused."""
    worths = {name: critic.part("worth") for name, critic in critics.items()}
    worths = {name: worth for name, worth in worths.items() if worth.rows("by_rollouts")}
    if not worths:
        return
    headings = ["GRPO's\nbaseline"]
    for name in worths:
        headings += [f"{in_short(shown_name(name))},\nfused", "equals a\ngroup of"]
    table = new_table("rollouts\na prompt", headings)
    first = next(iter(worths.values()))
    for index, row in enumerate(first.rows("by_rollouts")):
        cells = [row.part("group_mean").cell("advantage_variance", three).text]
        for worth in worths.values():
            rows = worth.rows("by_rollouts")
            fused = rows[index].part("fused") if index < len(rows) else _NOTHING
            cells += [fused.cell("advantage_variance", three).text, fused.cell("equals_group_of", group_size).text]
        table.add_row(str(row.get("rollouts")), *cells)
    alone = [DASH]
    for name, worth in worths.items():
        alone += [
            worth.part("critic").cell("advantage_variance", three).text,
            critics[name].cell("worth_in_rollouts", group_size).text,
        ]
    table.add_row("critic alone", *alone)
    if fits(console, table):
        console.print("\nVariance of advantages by rollouts a prompt", style="bold")
        console.print(table)


def draw_positions(console: "Console", critics: Sequence[Record], predictions: Named) -> None:
    """By part of the response: explained variance of critics and baselines, and other figures of the first critic."""
    parts = critics[0].rows("by_position")
    if not parts:
        return
    columns = [TOKENS, MEAN_RETURN]
    if len(critics) == 1:
        columns += [MEAN_VALUE, *_auc_columns(critics[0], parts), *table_columns("by_position")[1:]]
    # The constant explains nothing anywhere but for the drift of the mean; it would only take room.
    others = [(name, metrics.rows("by_position")) for name, metrics in predictions if name != shown_name("constant")]
    others = [(name, rows) for name, rows in others if rows]
    candidates = [
        positions_table(parts, columns, others),
        positions_table(parts, columns[:2], others),
        positions_table(parts, [], others[:1]),
    ]
    console.print("\nBy position in the response: explained variance", style="bold")
    console.print(first_that_fits(console, candidates))


def _auc_columns(critic: Record, parts: Sequence[Record]) -> list[Column]:
    """AUC within prompts at each of the parts; nothing where there are not two outcomes."""
    column = metric_column(metric_named(AUC_WITHIN), narrow=True)
    rows = {part.at: row for part, row in zip(parts, critic.rows("auc_by_position"), strict=False)}
    if not rows:
        return []
    return [
        Column(label=column.label, heading=column.heading, cell=lambda part: column.cell(rows.get(part.at, _NOTHING)))
    ]


_NOTHING = Record({}, "")


def positions_table(
    parts: Sequence[Record], columns: Sequence[Column], others: list[tuple[str, list[Record]]]
) -> "Table":
    """A row for each part of the response, with the explained variance of `others` at the end."""
    explained = metric_column(metric_named(MAIN))
    names = [in_short(name) for name, _ in others]
    table = new_table("part", [*(column.heading for column in columns), *names])
    for index, part in enumerate(parts):
        label = f"{100 * part.get('from'):.0f}-{100 * part.get('to'):.0f} %"
        figures = [column.cell(part).text for column in columns]
        ends = [explained.cell(rows[index]).text if index < len(rows) else DASH for _, rows in others]
        table.add_row(label, *figures, *ends)
    return table


def draw_labels(console: "Console", critics: dict[str, Record]) -> None:
    """A table for each --by column: its values as rows, the largest first."""
    first = next(iter(critics.values()))
    for column in first.part("by").parts():
        rows = label_rows(first, column)
        after = [c for c in table_columns("by")[1:] if not (c.optional and c.is_empty(list(rows.values())))]
        shown = list(rows)[:ROWS_SHOWN]
        candidates = [
            labels_table(column, shown, critics, [ROLLOUTS, TOKENS], after if len(critics) == 1 else []),
            labels_table(column, shown, critics, [ROLLOUTS, TOKENS], []),
            labels_table(column, shown, critics, [], []),
        ]
        console.print(f"\nBy {column}: explained variance", style="bold")
        console.print(first_that_fits(console, candidates))
        if len(rows) > len(shown):
            console.print(f"  and {len(rows) - len(shown):,} more values; --json has them all", style="dim")


def labels_table(
    column: str,
    labels: Sequence[str],
    critics: dict[str, Record],
    before: Sequence[Column],
    after: Sequence[Column],
) -> "Table":
    """The values of one column as rows, each critic's explained variance in the middle."""
    explained = metric_column(metric_named(MAIN))
    names = [in_short(shown_name(name)) for name in critics]
    table = new_table(column, [*(c.heading for c in before), *names, *(c.heading for c in after)])
    for label in labels:
        first, *others = [metrics.part("by").part(column).part(label) for metrics in critics.values()]
        table.add_row(
            label,
            *(c.cell(first).text for c in before),
            *(explained.cell(row).text for row in (first, *others)),
            *(c.cell(first).text for c in after),
        )
    return table
