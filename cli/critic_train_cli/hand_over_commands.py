"""The commands that take a critic further: `export` into another system's form, `show` in the terminal."""

from typing import TYPE_CHECKING, Any

import critic_train
from critic_train.settings import ExportSettings, ShowSettings
from critic_train.text import count, format_bytes, short
from critic_train_cli.command import Command
from critic_train_cli.exit_codes import DONE
from critic_train_cli.job import choose_view, exit_code_of, run_job
from critic_train_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console


def run_export(settings: ExportSettings, output: Output) -> int:
    """Write a critic for another system, then print what was compared and how it is loaded."""
    view = choose_view(output, stopping="stopping", before_first_step="stopping")
    ended = run_job(lambda stop: critic_train.export(settings, stop), view, output)
    if ended.status != "finished":
        output.result({"status": ended.status}, lambda console: None)
        return exit_code_of(ended)
    output.result(ended.result, lambda console: draw_export(console, ended.result))
    return DONE


def draw_export(console: "Console", result: dict[str, Any]) -> None:
    """Print what was written, where the bias is, what was compared by whose code, and what to copy."""
    from rich.table import Table

    console.print(f"Exported for {result['to']}: {result['directory']} ({format_bytes(result['bytes'])})", style="bold")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in export_rows(result):
        table.add_row(name, value)
    console.print()
    console.print(table)
    console.print()
    for line in result["usage"]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def export_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The names and values of what an export did."""
    bias, compared = result["bias"], result["compared"]
    rows = [
        ("critic", result["model"]),
        ("class", f"{result['class']}, head {result['head']} (as in {result['source']})"),
        ("bias", f"{short(bias['value'])}: {bias['where']}"),
    ]
    if "largest_change" in bias:
        rows.append(
            (
                "values",
                f"change by at most {short(bias['largest_change'])}, root mean square "
                f"{short(bias['root_mean_square_change'])}, over {count(bias['compared_response_tokens'])} response "
                f"tokens; fitted to {count(bias['fitted_to_response_tokens'])}",
            )
        )
    rows.append(
        (
            "loaded again",
            f"by {compared['by']}: {count(compared['values'])} values of {compared['sequences']} sequences differ by "
            f"at most {compared['largest_difference']:.1e}",
        )
    )
    return rows


EXPORT = Command(
    name="export",
    settings=ExportSettings,
    about="Write a critic in the class and key names that another system loads. The directory is loaded again, by that "
    "system's own code where it is installed, and its values are compared to 1e-5 before it gets its name. A bias that "
    "the system's head lacks is kept where the system adds one, or fitted away (--bias refit), never dropped.",
    examples=(
        "critic-train export runs/rollouts critic_for_verl/ --to verl",
        "critic-train export runs/rollouts critic_for_openrlhf/ --to openrlhf --data held_out/",
        "critic-train export runs/rollouts critic/ --to openrlhf --bias refit --data rollouts/",
    ),
    work=run_export,
)


def run_show(settings: ShowSettings, output: Output) -> int:
    """Show rollouts or a text, token by token."""
    view = choose_view(output, stopping="stopping", before_first_step="stopping")
    ended = run_job(lambda stop: critic_train.show(settings, stop), view, output)
    if ended.status != "finished":
        output.result({"status": ended.status}, lambda console: None)
        return exit_code_of(ended)

    from critic_train_cli.rollout_view import draw_rollouts

    output.result(ended.result, lambda console: draw_rollouts(console, ended.result["rollouts"]))
    return DONE


SHOW = Command(
    name="show",
    settings=ShowSettings,
    about="Show rollouts in the terminal, tokens shaded by the critic's value, with value, old value and return beside "
    "each line. One prompt group by its uid, the first rollouts of the data, or any text. Without MODEL the stored "
    "values are shown.",
    examples=(
        "critic-train show runs/rollouts --data held_out/ --uid 17",
        "critic-train show --data rollouts/ --uid 17      # the stored values",
        "critic-train show runs/a --prompt 'What is 2 + 2?' --text 'It is 4.' --tokenizer Qwen3-0.6B/",
    ),
    work=run_show,
)
