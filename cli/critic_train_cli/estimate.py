"""What `fit --dry-run` says, on one screen."""

from typing import TYPE_CHECKING, Any

from critic_train.figures import count, duration, size

if TYPE_CHECKING:
    from rich.console import Console


def draw_estimate(console: "Console", found: dict[str, Any]) -> None:
    """Print what a run would take.

    Args:
        console: where.
        found: see `dry_run.dry_run`.
    """
    from rich.table import Table

    console.print("Dry run: nothing was trained and nothing is left behind.", style="bold")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=console.width >= 50)
    table.add_column(overflow="fold")
    for name, value in rows(found):
        table.add_row(name, value)
    console.print()
    console.print(table)
    for line in shortages(found):
        console.print(line, style="bold")


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value."""
    memory, disk, seconds = found["memory"], found["disk"], found["seconds"]
    computed = f", {count(found['computed_tokens'])} through the model" if found["packing"] == "forest" else ""
    some = found["trained_parameters"] != found["parameters"]
    trained = f", {count(found['trained_parameters'])} of them trained" if some else ""
    states = f", {size(disk['states'])} for the frozen trunk's states" if disk["states"] else ""
    keeping = seconds["keeping_states"]
    first = f", {duration(keeping)} the frozen trunk once" if keeping else ""
    device = f" of {size(memory['device'])}" if memory["device"] else ""
    elsewhere = {"none": "", "optimizer": " (in host memory)", "all": " (all in host memory)"}[found["offload"]]
    return [
        ("rollouts", f"{found['rollouts']:,} to train on, {found['held_out_rollouts']:,} held out"),
        ("tokens an epoch", f"{count(found['tokens'])}{computed}"),
        ("steps", f"{found['steps']:,} in {found['epochs']:.3g} epochs, {found['evaluations']:,} evaluations"),
        ("parameters", f"{count(found['parameters'])}{trained}"),
        ("memory", f"{size(memory['peak'])}{device} at the peak of the timed steps, on {found['device']}"),
        ("  of it", f"weights {size(memory['weights'])}, gradients {size(memory['gradients'])}, "
                    f"moments {size(memory['moments'])}{elsewhere}"),
        ("disk", f"{size(disk['needed'])} needed, {size(disk['free'])} free at {found['out']}"),
        ("  of it", f"{size(disk['checkpoint'])} a checkpoint, {size(disk['cache'])} for the run's cache{states}"),
        ("speed", f"{count(found['tokens_per_second'])} tokens/s{' once states are kept' if keeping else ''}"),
        ("time", f"{duration(seconds['total'])}, of which evaluating {duration(seconds['evaluating'])}{first}"),
    ]  # fmt: skip


def shortages(found: dict[str, Any]) -> list[str]:
    """What there is too little of."""
    disk, memory = found["disk"], found["memory"]
    lines = []
    if disk["needed"] > disk["free"]:
        lines.append("\nThe disk will not do: a lower --keep, or another --out.")
    if memory["device"] and memory["peak"] > 0.95 * memory["device"]:
        lines.append("\nThe device's memory will hardly do: a lower --max-tokens, or --precision bf16.")
    return lines
