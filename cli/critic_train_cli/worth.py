"""What a critic is worth to the policy that trains with it: right told from wrong, less variance, honest values."""

from typing import TYPE_CHECKING, Any

from critic_train.figures import DASH, interval, number, three, with_interval
from critic_train_cli.columns import Column, Metrics, figure, fits, new_table

if TYPE_CHECKING:
    from rich.console import Console


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
