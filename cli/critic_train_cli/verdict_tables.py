"""What a critic is worth to the policy that trains with it: right told from wrong, less variance, honest values.

Where a critic is good and where it is not: by position in the response, by the values of a column.

The verdict of `eval` as tables: critics beside baselines, then by position and by column.
"""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from critic_train.text import DASH, count, fixed, interval, number, percent, short, signed, three, with_interval
from critic_train_cli.table_columns import (
    Column,
    Metrics,
    figure,
    first_that_fits,
    fits,
    in_short,
    new_table,
    shown_name,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def told_apart(metrics: Metrics) -> str:
    """AUC within prompt groups with its interval."""
    return with_interval(metrics.get("auc_within_group"), metrics.get("auc_within_group_interval"))


def from_where(metrics: Metrics) -> str:
    """The share of the response from which on right is told from wrong: `30 %`."""
    start = number(metrics.get("tells_apart_from"))
    return DASH if start is None else f"{100 * start:.0f} %"


def variance_change(metrics: Metrics) -> str:
    """The variance of advantages against GRPO's: `-23 % [-31, -12]`."""
    reduction = number(metrics.get("variance_reduction"))
    if reduction is None:
        return DASH
    bounds: Any = metrics.get("variance_reduction_interval")
    shown = f" [{-100 * bounds[1]:+.0f}, {-100 * bounds[0]:+.0f}]" if interval(bounds) else ""
    return f"{-100 * reduction:+.0f} %{shown}"


def against_monte_carlo(metrics: Metrics) -> str:
    """Explained variance against Monte-Carlo returns with its interval."""
    found = metrics.get("monte_carlo") or {}
    return with_interval(found.get("explained_variance"), found.get("explained_variance_interval"))


WORTH = (
    Column("AUC within\nprompts", told_apart),
    Column("right from\nwrong from", from_where),
    Column("advantage variance\nagainst GRPO's", variance_change),
    Column("calibration\nerror", figure("expected_calibration_error", three)),
    Column("explained variance,\nMonte Carlo", against_monte_carlo),
)


def draw_worth(console: "Console", named: list[tuple[str, Metrics]]) -> None:
    """One row a critic: the columns that anybody has a figure for; a block each where that is too wide."""
    rows: list[tuple[str, Any]] = [(name, metrics) for name, metrics in named if "auc_within_group" in metrics]
    columns = [column for column in WORTH if any(column.text(metrics) != DASH for _, metrics in rows)]
    if not columns:
        return
    table = new_table("", [column.heading for column in columns])
    for name, metrics in rows:
        table.add_row(name, *(column.text(metrics) for column in columns))
    console.print()
    if fits(console, table):
        console.print(table)
        return
    for name, metrics in rows:
        console.print(name, style="bold")
        for column in columns:
            heading = column.heading.replace("\n", " ")
            console.print(f"  {heading:<{33 if console.width >= 60 else 0}} {column.text(metrics)}")


ROWS_SHOWN = 20


def draw_positions(console: "Console", critics: dict[str, Metrics], named: list[tuple[str, Metrics]]) -> None:
    """By part of the response: explained variance of everyone, and how the first critic is biased there."""
    first = next(iter(critics.values()))
    parts: list[Metrics] = first.get("by_position") or []
    if not parts:
        return
    told_apart = first.get("auc_by_position") or []
    parts = [
        part | {"auc": told_apart[k].get("auc_within_group")} if told_apart else part for k, part in enumerate(parts)
    ]
    about = [
        Column("tokens", figure("tokens", count)),
        Column("mean\nreturn", figure("mean_return")),
        Column("mean\nvalue", figure("mean_value")),
        Column("MSE", figure("mse", three)),
        Column("bias", figure("bias", signed)),
    ]
    if told_apart:
        about.insert(3, Column("AUC in\nprompts", figure("auc")))
    if len(critics) > 1:
        about = about[:2]
    others = [(name, metrics["by_position"]) for name, metrics in named if metrics.get("by_position")]
    # The constant explains nothing anywhere but for the drift of the mean; it would only take room.
    others = [(name, table) for name, table in others if name != shown_name("constant")]
    candidates = [
        positions_table(parts, about, others),
        positions_table(parts, about[:2], others),
        positions_table(parts, [], others[:1]),
    ]
    console.print("\nBy position in the response: explained variance", style="bold")
    console.print(first_that_fits(console, candidates))


def positions_table(parts: list[Metrics], about: Sequence[Column], others: list[tuple[str, list[Metrics]]]) -> "Table":
    """Deciles as rows."""
    names = [in_short(name) for name, _ in others]
    table = new_table("part", [*(column.heading for column in about), *names])
    for index, part in enumerate(parts):
        label = f"{100 * part['from']:.0f}-{100 * part['to']:.0f} %"
        figures = [column.text(part) for column in about]
        explained = [fixed(rows[index].get("explained_variance")) if index < len(rows) else DASH for _, rows in others]
        table.add_row(label, *figures, *explained)
    return table


def draw_slices(console: "Console", critics: dict[str, Metrics]) -> None:
    """A table for each --by column: its values as rows, the largest first."""
    first = next(iter(critics.values()))
    for column, slices in (first.get("by") or {}).items():
        ordered = sorted(slices, key=lambda value: -(slices[value].get("tokens") or 0))
        shown = ordered[:ROWS_SHOWN]
        about = [Column("rollouts", figure("rollouts", count)), Column("tokens", figure("tokens", count))]
        more = [
            Column("within\nprompts", figure("explained_variance_within_group")),
            Column("MSE", figure("mse", three)),
            Column("bias", figure("bias", signed)),
        ]
        if any(number(row.get("auc_within_group")) is not None for row in slices.values()):
            more.insert(1, Column("AUC in\nprompts", figure("auc_within_group")))
        candidates = [
            slices_table(column, shown, critics, about, more if len(critics) == 1 else []),
            slices_table(column, shown, critics, about, []),
            slices_table(column, shown, critics, [], []),
        ]
        console.print(f"\nBy {column}: explained variance", style="bold")
        console.print(first_that_fits(console, candidates))
        if len(ordered) > len(shown):
            console.print(f"  and {len(ordered) - len(shown):,} more values; --json has them all", style="dim")


def slices_table(
    column: str,
    values: list[str],
    critics: dict[str, Metrics],
    before: Sequence[Column],
    after: Sequence[Column],
) -> "Table":
    """The values of one column as rows, each critic's explained variance in the middle."""
    names = [in_short(shown_name(name)) for name in critics]
    table = new_table(column, [*(c.heading for c in before), *names, *(c.heading for c in after)])
    first = next(iter(critics.values()))
    for value in values:
        own = first["by"][column][value]
        explained = [
            fixed(metrics.get("by", {}).get(column, {}).get(value, {}).get("explained_variance"))
            for metrics in critics.values()
        ]
        table.add_row(str(value), *(c.text(own) for c in before), *explained, *(c.text(own) for c in after))
    return table


def explained(metrics: Metrics) -> str:
    """Explained variance with its interval beside it."""
    return with_interval(metrics.get("explained_variance"), metrics.get("explained_variance_interval"))


EXPLAINED = (
    Column("explained\nvariance", explained),
    Column("within\nprompts", figure("explained_variance_within_group")),
    Column("Pearson", figure("pearson")),
    Column("Spearman", figure("spearman")),
)
ERRORS = (
    Column("MSE", figure("mse", three)),
    Column("MAE", figure("mae", three)),
    Column("bias", figure("bias", signed)),
    Column("value\nloss", figure("value_loss", three)),
    Column("clipfrac", figure("clipfrac", percent)),
)
ALSO_COMPARED = {
    "explained_variance_within_group": "within prompts",
    "auc_within_group": "AUC within prompts",
    "mse": "MSE",
}
"""What else is told of two critics, under the difference of their explained variance."""


def draw_verdict(console: "Console", verdict: dict[str, Any]) -> None:
    """Print the verdict: in words, then in figures.

    Args:
        console: where.
        verdict: what `evaluate` found; parts that are missing are left out.
    """
    if not named_metrics(verdict):
        console.print("Interrupted: nothing was judged.", style="bold")
        return
    draw_words(console, verdict.get("words") or [])
    console.print()
    console.print(data_line(verdict), style="dim")
    named = named_metrics(verdict)
    draw_comparison(console, named)
    draw_worth(console, named)
    draw_differences(console, verdict)
    critics = verdict.get("critics") or {}
    if critics:
        draw_positions(console, critics, named)
        draw_slices(console, critics)


def draw_words(console: "Console", sentences: Sequence[str]) -> None:
    """The verdict in words, a line each."""
    wide = max(console.width, 12)
    for sentence in sentences:
        console.print(
            textwrap.fill(f"- {sentence}", wide, subsequent_indent="  ", break_on_hyphens=False), style="bold"
        )


def named_metrics(verdict: dict[str, Any]) -> list[tuple[str, Metrics]]:
    """Critics, then baselines, by the names shown. Stored values that are judged are no baseline as well."""
    critics, baselines = verdict.get("critics") or {}, verdict.get("baselines") or {}
    named = [(shown_name(name), metrics) for name, metrics in critics.items()]
    return named + [(shown_name(n), metrics) for n, metrics in baselines.items() if n not in critics]


def data_line(verdict: dict[str, Any]) -> str:
    """What was judged on."""
    returns = verdict.get("returns") or {}
    parts = [
        f"{verdict[key]:,} {key.replace('_', ' ')}"
        for key in ("rollouts", "prompt_groups", "response_tokens")
        if isinstance(verdict.get(key), int)
    ]
    line = ", ".join(parts)
    if returns:
        low, high = short(returns.get("min")), short(returns.get("max"))
        mean, std = short(returns.get("mean")), short(returns.get("std"))
        line += f"; returns {mean} on average, std {std}, from {low} to {high}"
    for what in ("rows", "files"):
        left_out = (verdict.get(f"{what}_left_out") or {}).get("count")
        line += f"; {left_out:,} {what if left_out > 1 else what[:-1]} left out" if left_out else ""
    return line


def draw_comparison(console: "Console", named: list[tuple[str, Metrics]]) -> None:
    """One row a critic and a baseline: in one table, in two where that is too wide, else a block each."""
    for layout in ((EXPLAINED + ERRORS,), (EXPLAINED, ERRORS)):
        tables = [new_table("", [column.heading for column in columns]) for columns in layout]
        for table, columns in zip(tables, layout, strict=True):
            for name, metrics in named:
                table.add_row(name, *(column.text(metrics) for column in columns))
        if all(fits(console, table) for table in tables):
            for table in tables:
                console.print()
                console.print(table)
            return
    for name, metrics in named:
        console.print()
        console.print(name, style="bold")
        for column in EXPLAINED + ERRORS:
            heading = column.heading.replace("\n", " ")
            console.print(f"  {heading:<{18 if console.width >= 45 else 0}} {column.text(metrics)}")


def draw_differences(console: "Console", verdict: dict[str, Any]) -> None:
    """By how much explained variance differs, paired: more telling than two intervals side by side."""
    found: list[tuple[str, Metrics]] = []
    for name, metrics in (verdict.get("critics") or {}).items():
        for other, paired in (metrics.get("explained_variance_minus") or {}).items():
            found.append((f"{shown_name(name)} - {shown_name(other)}", paired))
    for pair, paired in (verdict.get("differences") or {}).items():
        found.append((pair, paired))
        found += [(f"  {what}", paired[key]) for key, what in ALSO_COMPARED.items() if key in paired]
    found = [(pair, paired) for pair, paired in found if number(paired.get("difference")) is not None]
    if not found:
        return
    console.print("\nDifference of explained variance", style="bold")
    table = new_table("", [""], bare=True)
    for pair, paired in found:
        difference = f"{paired['difference']:+.3f} {interval(paired.get('interval'))}".rstrip()
        table.add_row("  " + pair, difference)
    console.print(table)
