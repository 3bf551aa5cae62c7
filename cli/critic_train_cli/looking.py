"""Jobs that only look: what they have found is shown, and whether it is sound is their exit code."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from critic_train.events import Event
from critic_train.stopping import StopRequest
from critic_train_cli.faults import DONE, REFUSED
from critic_train_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console


def look_over(
    start: Callable[[StopRequest], Iterator[Event]], draw: Callable[["Console", dict[str, Any]], None], output: Output
) -> int:
    """Run a job whose result has "sound" in it; draw the result, or give it as JSON. The exit code: 1 if unsound."""
    from critic_train_cli.job import exit_code_of, run_job
    from critic_train_cli.view_choice import choose_view

    ended = run_job(start, choose_view(output, stopping="stopping"), output)
    if ended.status != "finished":
        output.result({"status": ended.status}, lambda console: None)
        return exit_code_of(ended)
    output.result(ended.result, lambda console: draw(console, ended.result))
    return DONE if ended.result["sound"] else REFUSED
