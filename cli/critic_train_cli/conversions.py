"""The summary of a conversion."""

from typing import TYPE_CHECKING, Any

from critic_train.events import RunEnded

if TYPE_CHECKING:
    from rich.console import Console

HEADLINES = {
    "finished": "Converted: {rollouts:,} rollouts.",
    "already finished": "Already converted: {rollouts:,} rollouts. Nothing was done.",
    "interrupted": "Interrupted after {rollouts:,} rollouts; the same command goes on.",
}


def draw_conversion(console: "Console", ended: RunEnded) -> None:
    """Print where the shards are, what is in them, and the next command.

    Args:
        console: of stdout.
        ended: the last event of the conversion.
    """
    from rich.table import Table

    result = ended.result
    console.print(HEADLINES[ended.status].format(rollouts=result["rollouts"]), style="bold")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=console.width >= 50)
    table.add_column(overflow="fold")
    for name, value in rows(result):
        table.add_row(name, value)
    console.print()
    console.print(table)
    if ended.status != "interrupted":
        console.print()
        console.print(f"Next: {result['next']}", soft_wrap=True, markup=False, highlight=False)


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the summary table, in order; without those that are empty."""
    formats: dict[str, int] = {}
    for source in result["sources"]:
        formats[source["format"]] = formats.get(source["format"], 0) + 1
    bad_rows = result["rows_left_out"]["count"]
    table = [
        ("sources", ", ".join(f"{count:,} of {name}" for name, count in formats.items())),
        ("tokens", f"{result['tokens']:,}, {result['response_tokens']:,} of responses"),
        ("shards", f"{result['shards']:,} in {result['to']} ({result['bytes'] / 1e6:,.1f} MB)"),
        ("columns", ", ".join(result["columns"])),
    ]
    if bad_rows:
        reasons = "; ".join(f"{count:,} with {reason}" for reason, count in result["rows_left_out"]["reasons"].items())
        table.append(("left out", f"{bad_rows:,} rollouts ({reasons})"))
    if result["files_left_out"]["count"]:
        table.append(("left out", f"{result['files_left_out']['count']:,} files"))
    return [(name, value) for name, value in table if value]
