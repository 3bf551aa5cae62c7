"""The end of a run on one screen: what came of it, where it is, what to run next."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from critic_train.events import RunEnded
from critic_train.figures import duration, number, short, with_interval
from critic_train.settings import FitSettings
from critic_train_cli.columns import shown_name
from critic_train_cli.sparkline import sparkline

if TYPE_CHECKING:
    from rich.console import Console

CURVE_WIDEST, BESIDE_THE_CURVE = 32, 52


def draw_summary(console: "Console", ended: RunEnded, losses: Sequence[float]) -> None:
    """Print what came of a run.

    Args:
        console: where.
        ended: the run's last event.
        losses: the value loss over this session's steps, in order.
    """
    from rich.table import Table

    console.print(headline(ended), style="bold")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=console.width >= 50)
    table.add_column(overflow="fold")
    wide = max(8, min(CURVE_WIDEST, console.width - BESIDE_THE_CURVE))
    curve = sparkline(losses, wide, unicode=console.encoding.startswith("utf"))
    for name, value in rows(ended.result, losses, curve):
        table.add_row(name, value)
    if table.row_count:
        console.print()
        console.print(table)


def draw_next(console: "Console", ended: RunEnded, settings: FitSettings) -> None:
    """Print the command to run next."""
    for line in next_lines(ended, settings):
        # Unwrapped, so that it can be copied.
        console.print(line, soft_wrap=True)


def headline(ended: RunEnded) -> str:
    """How the run ended, in one line."""
    result = ended.result
    steps = result.get("steps")
    if ended.status == "already finished":
        return f"Already finished: {in_steps(steps)}. Nothing was done."
    if ended.status == "interrupted":
        of = f" of {result['total_steps']}" if result.get("total_steps") else ""
        return f"Interrupted after step {steps}{of}." if steps else "Interrupted before the first step."
    return f"Finished: {in_steps(steps)} in {duration(result.get('elapsed_seconds'))}."


def in_steps(steps: Any) -> str:
    """`1 step`, `120 steps`."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def rows(result: dict[str, Any], losses: Sequence[float], curve: str) -> list[tuple[str, str]]:
    """The summary's rows: name and value. `curve` is the losses as a sparkline."""
    found: list[tuple[str, str]] = []
    last = number((result.get("training") or {}).get("value_loss"))
    last = number(result.get("value_loss")) if last is None else last
    if len(losses) > 1:
        found.append(("training loss", f"{short(losses[0])} {curve} {short(losses[-1])}"))
    elif last is not None:
        found.append(("training loss", short(last)))
    if result.get("skips"):
        found.append(("steps not taken", f"{result['skips']} (not finite)"))
    if number(result.get("explained_variance")) is not None:
        found.append(("explained variance, held out", ""))
        at = result.get("best_step")
        figure = with_interval(result["explained_variance"], result.get("explained_variance_interval"))
        found.append(("  this critic", figure + (f"  at step {at}" if at is not None else "")))
        for name, metrics in (result.get("baselines") or {}).items():
            bounds = metrics.get("explained_variance_interval")
            # The constant's interval is [0, 0] by definition.
            figure = with_interval(metrics.get("explained_variance"), None if name == "constant" else bounds)
            found.append((f"  {shown_name(name)}", figure))
    within = result.get("explained_variance_within_group")
    if number(within) is not None:
        bounds = result.get("explained_variance_within_group_interval")
        found.append(("within prompts", with_interval(within, bounds)))
    for name, key in (("best", "best"), ("newest checkpoint", "checkpoint"), ("report", "report")):
        if isinstance(result.get(key), str):
            found.append((name, result[key]))
    return found


def next_lines(ended: RunEnded, settings: FitSettings) -> list[str]:
    """What to run next, ready to copy."""
    result = ended.result
    if ended.status == "interrupted":
        return ["", "The same command goes on from there."] if result else []
    model = result.get("best") or result.get("checkpoint")
    if not isinstance(model, str):
        return []
    data = settings.val_data or settings.data
    flags = " ".join(f"--data {shlex.quote(path)}" for path in data)
    lines = ["", f"Next: critic-train eval --model {shlex.quote(model)} {flags}"]
    if not settings.val_data:
        lines.append("(it was trained on most of these; rollouts it has not seen say more)")
    if ended.status == "already finished":
        lines.append("Another run: the same command with another --out")
    return lines
