"""The results of `fit`, `fit --dry-run`, `convert` and `report` in the terminal, each on one screen."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from critic_train.events import RunEnded
from critic_train.report.verdict_model import shown_name
from critic_train.settings import EvalSettings, FitSettings
from critic_train.settings.command_lines import COMPUTE, READING, RETURNS, next_command
from critic_train.text import count, duration, format_bytes, number, short, with_interval
from critic_train_cli.terminal import is_terminal, sparkline

if TYPE_CHECKING:
    from rich.console import Console

    from critic_train.report.page import Report

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
    for name, value in summary_rows(ended.result, losses, curve):
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


def summary_rows(result: dict[str, Any], losses: Sequence[float], curve: str) -> list[tuple[str, str]]:
    """The summary's rows: name and value. `curve` is the losses as a sparkline."""
    rows: list[tuple[str, str]] = []
    last = number((result.get("training") or {}).get("value_loss"))
    last = number(result.get("value_loss")) if last is None else last
    if len(losses) > 1:
        rows.append(("training loss", f"{short(losses[0])} {curve} {short(losses[-1])}"))
    elif last is not None:
        rows.append(("training loss", short(last)))
    if result.get("skips"):
        rows.append(("steps not taken", f"{result['skips']} (not finite)"))
    if number(result.get("explained_variance")) is not None:
        rows.append(("explained variance, held out", ""))
        at = result.get("best_step")
        figure = with_interval(result["explained_variance"], result.get("explained_variance_interval"))
        rows.append(("  this critic", figure + (f"  at step {at}" if at is not None else "")))
        for name, metrics in (result.get("baselines") or {}).items():
            bounds = metrics.get("explained_variance_interval")
            # The constant's interval is [0, 0] by definition.
            figure = with_interval(metrics.get("explained_variance"), None if name == "constant" else bounds)
            rows.append((f"  {shown_name(name)}", figure))
    within = result.get("explained_variance_within_group")
    if number(within) is not None:
        bounds = result.get("explained_variance_within_group_interval")
        rows.append(("within prompts", with_interval(within, bounds)))
    for name, key in (("best", "best"), ("newest checkpoint", "checkpoint"), ("report", "report")):
        if isinstance(result.get(key), str):
            rows.append((name, result[key]))
    return rows


def next_lines(ended: RunEnded, settings: FitSettings) -> list[str]:
    """What to run next, ready to copy."""
    result = ended.result
    if ended.status == "interrupted":
        return ["", "The same command goes on from there."] if result else []
    model = result.get("best") or result.get("checkpoint")
    if not isinstance(model, str):
        return []
    lines = ["", f"Next: {eval_command(model, settings)}"]
    if not settings.reading.val_data:
        lines.append("(it was trained on most of these; rollouts it has not seen say more)")
    if ended.status == "already finished":
        lines.append("Another run: the same command with another --out")
    return lines


def eval_command(model: str, settings: FitSettings) -> str:
    """The command that judges a run's critic on the rollouts that the run held out, as the run itself judged it."""
    returns = settings.returns
    given: dict[str, Any] = {"data": settings.reading.val_data or settings.reading.data}
    if returns.returns == "gae":  # which depend on the critic's own values: a run is judged on Monte-Carlo returns
        policy = returns.lam_policy or (f"{returns.lam:g}" if returns.lam != 1 else None)
        given |= {"returns": "mc", "lam": None, "lam_policy": policy}
    return next_command(EvalSettings, settings, READING + RETURNS + COMPUTE, model=[model], **given)


def draw_estimate(console: "Console", estimate: dict[str, Any]) -> None:
    """Print what a run would take.

    Args:
        console: where.
        estimate: see `dry_run.dry_run`.
    """
    from rich.table import Table

    console.print("Dry run: nothing was trained and nothing is left behind.", style="bold")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=console.width >= 50)
    table.add_column(overflow="fold")
    for name, value in estimate_rows(estimate):
        table.add_row(name, value)
    console.print()
    console.print(table)
    for line in shortages(estimate):
        console.print(line, style="bold")


def estimate_rows(estimate: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value."""
    memory, disk, seconds = estimate["memory"], estimate["disk"], estimate["seconds"]
    computed = f", {count(estimate['computed_tokens'])} through the model" if estimate["packing"] == "forest" else ""
    some = estimate["trained_parameters"] != estimate["parameters"]
    trained = f", {count(estimate['trained_parameters'])} of them trained" if some else ""
    states = f", {format_bytes(disk['states'])} for the frozen trunk's states" if disk["states"] else ""
    keeping = seconds["keeping_states"]
    first = f", {duration(keeping)} the frozen trunk once" if keeping else ""
    device = f" of {format_bytes(memory['device'])}" if memory["device"] else ""
    on_host = estimate["offload"].split("+")
    elsewhere = " (all in host memory)" if "all" in on_host else " (in host memory)" if "optimizer" in on_host else ""
    return [
        ("rollouts", f"{estimate['rollouts']:,} to train on, {estimate['held_out_rollouts']:,} held out"),
        ("tokens an epoch", f"{count(estimate['tokens'])}{computed}"),
        ("steps", f"{estimate['steps']:,} in {estimate['epochs']:.3g} epochs, {estimate['evaluations']:,} evaluations"),
        ("parameters", f"{count(estimate['parameters'])}{trained}"),
        ("memory", f"{format_bytes(memory['peak'])}{device} at the peak of the timed steps, on {estimate['device']}"),
        ("  of it", f"weights {format_bytes(memory['weights'])}, gradients {format_bytes(memory['gradients'])}, "
                    f"moments {format_bytes(memory['moments'])}{elsewhere}"),
        *_longest_rows(memory),
        ("disk", f"{format_bytes(disk['needed'])} needed, {format_bytes(disk['free'])} free at {estimate['out']}"),
        (
            "  of it",
            f"{format_bytes(disk['checkpoint'])} a checkpoint, {format_bytes(disk['cache'])} "
            f"for the run's cache{states}",
        ),
        ("speed", f"{count(estimate['tokens_per_second'])} tokens/s{' once states are kept' if keeping else ''}"),
        ("time", f"{duration(seconds['total'])}, of which evaluating {duration(seconds['evaluating'])}{first}"),
    ]  # fmt: skip


def _longest_rows(memory: dict[str, Any]) -> list[tuple[str, str]]:
    """What the longest rollout keeps on a rank, by how much is kept and by how many ranks cut it."""
    if "activations" not in memory:
        return []
    sizes = [f"{format_bytes(held)} ({kind})" for kind, held in memory["activations"].items()]
    cut, ranks = memory.get("sequence_parallel", 1), memory.get("ranks", 1)
    on_rank = f" on each of the {cut} ranks that cut it (--sequence-parallel {cut})" if cut > 1 else ""
    rows = [("  longest", f"{memory['longest_rollout']:,} tokens keep about {', '.join(sizes)}{on_rank}")]
    if ranks > 1:
        held = sum(memory[part] for part in ("weights", "gradients", "moments"))
        rows.append(
            ("  on a rank", f"{format_bytes(held / ranks)} of weights, gradients and moments: 1 of {ranks} parts")
        )
    if reason := memory.get("sequence_parallel_reason"):
        rows.append(("", f"--sequence-parallel {cut}: {reason}"))
    if by_ranks := memory.get("by_sequence_parallel"):
        sizes = [f"{format_bytes(held)} (N = {number})" for number, held in by_ranks.items()]
        keeping = f"--activation-checkpointing {memory['keeping']}"
        rows.append(("", f"on a rank with --sequence-parallel N: {', '.join(sizes)}; {keeping}"))
    if needed := memory.get("sequence_parallel_needed"):
        rows.append(("", f"beyond --max-tokens it goes through the model alone; --sequence-parallel {needed} cuts it"))
    return rows


def shortages(estimate: dict[str, Any]) -> list[str]:
    """What there is too little of."""
    disk, memory = estimate["disk"], estimate["memory"]
    lines = []
    if disk["needed"] > disk["free"]:
        lines.append("\nThe disk will not do: a lower --keep, or another --out.")
    if memory["device"] and memory["peak"] > 0.95 * memory["device"]:
        lines.append("\nThe device's memory will hardly do: a lower --max-tokens, or --precision bf16.")
    return lines


HEADLINES = {
    "finished": "Converted: {rollouts:,} rollouts.",
    "already finished": "Already converted: {rollouts:,} rollouts. Nothing was done.",
    "interrupted": "Interrupted after {rollouts:,} rollouts; the same command goes on.",
}


def draw_conversion(console: "Console", ended: RunEnded) -> None:
    """Print where the shards are, what is in them, and what to run next."""
    from rich.table import Table

    result = ended.result
    console.print(HEADLINES[ended.status].format(rollouts=result["rollouts"]), style="bold")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=console.width >= 50)
    table.add_column(overflow="fold")
    for name, value in conversion_rows(result):
        table.add_row(name, value)
    console.print()
    console.print(table)
    if ended.status != "interrupted":
        console.print()
        console.print(f"Next: {result['next']}", soft_wrap=True, markup=False, highlight=False)


def conversion_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values, in order."""
    formats: dict[str, int] = {}
    for source in result["sources"]:
        formats[source["format"]] = formats.get(source["format"], 0) + 1
    left_out = result["rows_left_out"]["count"]
    shown = [
        ("sources", ", ".join(f"{count:,} of {name}" for name, count in formats.items())),
        ("tokens", f"{result['tokens']:,}, {result['response_tokens']:,} of responses"),
        ("shards", f"{result['shards']:,} in {result['to']} ({result['bytes'] / 1e6:,.1f} MB)"),
        ("columns", ", ".join(result["columns"])),
    ]
    if left_out:
        reasons = "; ".join(f"{count:,} with {reason}" for reason, count in result["rows_left_out"]["reasons"].items())
        shown.append(("left out", f"{left_out:,} rollouts ({reasons})"))
    if result["files_left_out"]["count"]:
        shown.append(("left out", f"{result['files_left_out']['count']:,} files"))
    return [(name, value) for name, value in shown if value]


def draw_report(console: "Console", written: "Report", *, in_full: bool) -> None:
    """Print the page's path; on a terminal, where `in_full`, also the verdict and the charts of each source."""
    if in_full and is_terminal(sys.stdout):
        from critic_train_cli.text_charts import draw_charts
        from critic_train_cli.verdict_tables import draw_sentences

        for source in written.sources:
            if len(written.sources) > 1:
                console.print(source.label, style="bold")
            draw_sentences(console, source.evaluation.get("words") or ["no evaluation on held-out rollouts yet"])
            draw_charts(console, source.evaluation.data, [record.data for record in source.evaluations])
            console.print()
    # Unwrapped, so that it can be copied.
    console.print(f"{written.path} ({format_bytes(written.size_bytes)})", soft_wrap=True)
