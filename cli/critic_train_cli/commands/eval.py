"""`critic-train eval`: judge critics."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from critic_train.events import Event
from critic_train.figures import size
from critic_train.settings import EvalSettings
from critic_train.stopping import StopRequest
from critic_train_cli.command import Command
from critic_train_cli.faults import DONE, REFUSED
from critic_train_cli.output import Output
from critic_train_cli.terminal import RED, paint

if TYPE_CHECKING:
    from rich.console import Console


def work(settings: EvalSettings, output: Output) -> int:
    """Judge, showing how far it is; then the tables, or the verdict as JSON; last, which gates failed."""
    from critic_train_cli.job import exit_code_of, run_job
    from critic_train_cli.view_choice import choose_view

    def start(stop: StopRequest) -> Iterator[Event]:
        from critic_train.judging.evaluation import evaluate

        yield from evaluate(settings, stop)

    if settings.report is not None:
        from critic_train.reporting.place import refuse_place

        refuse_place(Path(settings.report), "--report")
    view = choose_view(output, stopping="stopping")
    ended = run_job(start, view, output)

    from critic_train_cli.charts import draw_charts
    from critic_train_cli.tables import draw_verdict

    def draw(console: "Console") -> None:
        draw_verdict(console, ended.result)
        draw_charts(console, ended.result, [], beside_tables=True)

    output.result(ended.result or {"status": ended.status}, draw)
    if settings.report is not None and ended.result:
        from critic_train.reporting.page import write_page
        from critic_train.reporting.sources import evaluation_source

        written = write_page(Path(settings.report), [evaluation_source(ended.result)])
        output.line(f"report: {settings.report} ({size(written)})")
    failed = [gate for gate in ended.result.get("gates") or [] if not gate["passed"]]
    for gate in failed:
        output.line(paint("failed:", RED, sys.stderr) + f" {gate['reason']} ({gate['flag']})")
    return exit_code_of(ended) or (REFUSED if failed else DONE)


EVAL = Command(
    name="eval",
    settings=EvalSettings,
    about="Say how good a critic is. Explained variance with its interval, errors and correlations stand beside "
    "three baselines: the constant mean, the stored values, and the prompt group's leave-one-out mean.",
    examples=(
        "critic-train eval --model runs/rollouts --data held_out/",
        "critic-train eval --model runs/a --model runs/b --data held_out/ --by task",
        "critic-train eval --data rollouts/      # judges the stored values",
        "critic-train eval --model runs/a --data held_out/ --fail-under explained_variance_interval.low=0.1",
    ),
    work=work,
)
