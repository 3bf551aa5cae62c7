"""Where a critic is good and where it is not: by position in the response, by the values of a column."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from critic_train.figures import DASH, count, fixed, number, signed, three
from critic_train_cli.columns import Column, Metrics, figure, first_that_fits, in_short, new_table, shown_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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
