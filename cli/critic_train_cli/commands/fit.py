"""`critic-train fit`: train a critic."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from critic_train.events import Event
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train_cli.command import Command
from critic_train_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console


def work(settings: FitSettings, output: Output) -> int:
    """Train, showing how it goes; then the summary, or the result as JSON."""
    from critic_train_cli.job import exit_code_of, run_job
    from critic_train_cli.view_choice import choose_view

    def start(stop: StopRequest) -> Iterator[Event]:
        from critic_train.training.fit import fit

        yield from fit(settings, stop)

    if settings.dry_run:
        return estimate(settings, output)
    output.run_directory = settings.out
    view = choose_view(output, stopping="stopping after this micro-batch; a checkpoint will be written")
    view.log_every = settings.log_every
    ended = run_job(start, view, output)

    from critic_train.reporting.sources import reread_run
    from critic_train_cli.charts import draw_charts
    from critic_train_cli.summary import draw_next, draw_summary

    if not output.as_json and not output.quiet:
        output.line("")

    def draw(console: "Console") -> None:
        draw_summary(console, ended, view.course.losses.points)
        run = reread_run(ended.result.get("out"))
        if run is not None:
            draw_charts(console, run.evaluation.data, [record.data for record in run.evaluations])
        draw_next(console, ended, settings)

    output.result(ended.result or {"status": ended.status}, draw)
    return exit_code_of(ended)


def estimate(settings: FitSettings, output: Output) -> int:
    """Say what the run would take."""
    from critic_train_cli.job import exit_code_of, run_job
    from critic_train_cli.view_choice import choose_view

    def start(stop: StopRequest) -> Iterator[Event]:
        from critic_train.training.dry_run import dry_run
        from critic_train.training.fit import run_path

        yield from dry_run(settings, run_path(settings), stop)

    ended = run_job(start, choose_view(output, stopping="stopping"), output)

    from critic_train_cli.estimate import draw_estimate

    output.result(
        ended.result or {"status": ended.status},
        lambda console: draw_estimate(console, ended.result) if ended.result else None,
    )
    return exit_code_of(ended)


FIT = Command(
    name="fit",
    settings=FitSettings,
    about="Train a critic from rollouts. The clipped value loss of PPO is minimised over Parquet shards, and a "
    "checkpoint is written that Hugging Face and verl load. The same command run again resumes.",
    examples=(
        "critic-train fit --data rollouts/",
        "critic-train fit --data rollouts/ --model Qwen3-0.6B/ --precision bf16",
        "critic-train fit --data rollouts/ --model Qwen3-0.6B/ --dry-run",
        "critic-train fit --data rollouts/ --config fit.toml --print-config",
    ),
    work=work,
)
