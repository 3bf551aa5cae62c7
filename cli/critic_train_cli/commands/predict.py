"""`critic-train predict`: write a critic's values into the shards."""

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from critic_train.events import Event
from critic_train.settings import PredictSettings
from critic_train.stopping import StopRequest
from critic_train_cli.command import Command
from critic_train_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console


def work(settings: PredictSettings, output: Output) -> int:
    """Predict and write, showing how far it is; then what was written, or the same as JSON."""
    from critic_train_cli.job import exit_code_of, run_job
    from critic_train_cli.view_choice import choose_view

    def start(stop: StopRequest) -> Iterator[Event]:
        from critic_train.predicting.predict import predict

        yield from predict(settings, stop)

    view = choose_view(output, stopping="stopping; the same command goes on from here")
    ended = run_job(start, view, output)
    output.result(ended.result, lambda console: draw(console, ended.result))
    return exit_code_of(ended)


def draw(console: "Console", result: dict[str, Any]) -> None:
    """Say what stands where, and what to do next."""
    files = f"{result['files']} of {result['files_in_all']} files"
    if result["status"] == "interrupted":
        console.print(f"Interrupted: {files} stand in {result['to']}.", style="bold")
        console.print("The same command goes on from there.")
        return
    head = {"already finished": "Already finished"}.get(result["status"], "Finished")
    columns = ", ".join(result["columns"])
    console.print(f"{head}: {columns} of {result['rows']:,} rows in {files} in {result['to']}.", style="bold")
    bad = (result["rows_left_out"] or {}).get("count")
    if bad:
        console.print(f"{bad:,} rows could not be used: they have nulls there.")
    # Unwrapped, so that it can be copied.
    console.print(f"\nNext: critic-train fit --data {shlex.quote(result['to'])}", soft_wrap=True)


PREDICT = Command(
    name="predict",
    settings=PredictSettings,
    about="Write a critic's values into the shards. Files, rows, row groups and every other column stay as they are; "
    "returns and advantages are computed from rewards where asked. The same command run again goes on.",
    examples=(
        "critic-train predict --model runs/rollouts --data rollouts/ --to next/",
        "critic-train predict --model runs/a --data rollouts/ --to next/ --returns gae --lam 0.95",
        "critic-train predict --model runs/a --data rollouts/ --to next/ --returns mc --write advantages",
    ),
    work=work,
)
