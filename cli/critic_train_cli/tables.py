"""The verdict of `eval` as tables: critics beside baselines, then by position and by column."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from critic_train.figures import interval, number, share, short, signed, three, with_interval
from critic_train_cli.columns import Column, Metrics, figure, fits, new_table, shown_name
from critic_train_cli.slices import draw_positions, draw_slices
from critic_train_cli.worth import draw_worth

if TYPE_CHECKING:
    from rich.console import Console


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
    Column("clipfrac", figure("clipfrac", share)),
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
