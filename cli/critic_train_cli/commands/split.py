"""`critic-train split`: hold prompts out, as shards of their own."""

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from critic_train.events import Event
from critic_train.settings import SplitSettings
from critic_train.stopping import StopRequest
from critic_train_cli.command import Command
from critic_train_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console


def work(settings: SplitSettings, output: Output) -> int:
    """Split, showing how far it is; then what went where, or the same as JSON."""
    from critic_train_cli.job import exit_code_of, run_job
    from critic_train_cli.view_choice import choose_view

    def start(stop: StopRequest) -> Iterator[Event]:
        from critic_train.data.splitting import split

        yield from split(settings, stop)

    ended = run_job(start, choose_view(output, stopping="stopping; the same command goes on from here"), output)
    output.result({"status": ended.status, **ended.result}, lambda console: draw(console, ended.status, ended.result))
    return exit_code_of(ended)


def draw(console: "Console", status: str, result: dict[str, Any]) -> None:
    """Say what went where, and what to do next."""
    if status == "interrupted":
        console.print("Interrupted. The same command goes on from there.", style="bold")
        return
    to = result["to"].rstrip("/")
    for side in ("train", "val"):
        rollouts, groups = result[side]["rollouts"], result[side]["prompt_groups"]
        console.print(f"{to}/{side}: {rollouts:,} rollouts of {groups:,} prompt groups", style="bold", soft_wrap=True)
    bad = result["rows_left_out"]["count"]
    if bad:
        console.print(f"{bad:,} rows that could not be used are in neither.")
    paths = (shlex.quote(f"{to}/{side}") for side in ("train", "val"))
    console.print("\nNext: critic-train fit --data {} --val-data {}".format(*paths), soft_wrap=True)


SPLIT = Command(
    name="split",
    settings=SplitSettings,
    about="Hold prompts out: write shards to train on and shards to judge on. Whole prompt groups go to one side, "
    "those that fit --val-fraction --seed would hold out; files, row order and columns stay as they are.",
    examples=(
        "critic-train split rollouts/ --to split/",
        "critic-train split rollouts/ --to split/ --val-fraction 0.05 --seed 1",
    ),
    work=work,
)
