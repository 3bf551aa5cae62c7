"""`critic-train fit`: train a critic."""

from collections.abc import Iterator

from critic_train.events import Event
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train_cli.command import Command
from critic_train_cli.output import Output


def work(settings: FitSettings, output: Output) -> int:
    """Train, showing how it goes; then the summary, or the result as JSON."""
    from critic_train_cli.job import exit_code_of, run_job
    from critic_train_cli.view_choice import choose_view

    def start(stop: StopRequest) -> Iterator[Event]:
        from critic_train.training.fit import fit

        yield from fit(settings, stop)

    output.run_directory = settings.out
    view = choose_view(output, stopping="stopping after this micro-batch; a checkpoint will be written")
    view.log_every = settings.log_every
    ended = run_job(start, view, output)

    from critic_train_cli.summary import draw_summary

    if not output.as_json and not output.quiet:
        output.line("")
    output.result(
        ended.result or {"status": ended.status},
        lambda console: draw_summary(console, ended, settings, view.course.losses.points),
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
        "critic-train fit --data rollouts/ --config fit.toml --print-config",
    ),
    work=work,
)
