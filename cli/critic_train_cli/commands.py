"""The commands: for each, the work it does and how its result is shown, then its entry in the program's list.

The library's functions are imported when they are called (see `critic_train.__getattr__`), while the view is already
on the screen.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import critic_train
from critic_train.events import Event
from critic_train.settings import (
    CheckSettings,
    ConvertSettings,
    EvalSettings,
    FitSettings,
    PredictSettings,
    ReportSettings,
    SplitSettings,
    VerifySettings,
)
from critic_train.stopping import StopRequest
from critic_train.text import format_bytes
from critic_train_cli.command import Command
from critic_train_cli.exit_codes import DONE, REFUSED
from critic_train_cli.job import choose_view, exit_code_of, run_inspection, run_job
from critic_train_cli.output import Output
from critic_train_cli.terminal import RED, paint

if TYPE_CHECKING:
    from rich.console import Console

CONTINUES = "stopping; the same command goes on from here"
"""Shown at the first signal by commands that keep what they have written."""


def run_fit(settings: FitSettings, output: Output) -> int:
    """Train a critic, then print the summary with charts."""
    if settings.run.dry_run:
        return run_dry_run(settings, output)
    output.run_directory = settings.run.out
    view = choose_view(
        output,
        stopping="stopping after this micro-batch; a checkpoint will be written",
        before_first_step="stopping: no step has been taken since the start, so there is no checkpoint to write",
        nproc=settings.compute.nproc,
    )
    view.log_every = settings.run.log_every
    ended = run_job(lambda stop: critic_train.fit(settings, stop), view, output)

    from critic_train.report.report_sources import reread_run
    from critic_train_cli.command_results import draw_next, draw_summary
    from critic_train_cli.text_charts import draw_charts

    if not output.as_json and not output.quiet:
        output.line("")

    def draw(console: "Console") -> None:
        draw_summary(console, ended, view.state.losses.points)
        run = reread_run(ended.result.get("out"))
        if run is not None:
            draw_charts(console, run.evaluation.data, [record.data for record in run.evaluations])
        draw_next(console, ended, settings)

    output.result(ended.result or {"status": ended.status}, draw)
    return exit_code_of(ended)


def run_dry_run(settings: FitSettings, output: Output) -> int:
    """Print the time, memory and disk that the run would take."""

    def start(stop: StopRequest) -> Iterator[Event]:
        from critic_train.training.dry_run import dry_run
        from critic_train.training.fit import run_path

        yield from dry_run(settings, run_path(settings), stop)

    ended = run_job(start, choose_view(output, stopping="stopping", before_first_step="stopping"), output)

    from critic_train_cli.command_results import draw_estimate

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
    work=run_fit,
)


def run_eval(settings: EvalSettings, output: Output) -> int:
    """Evaluate critics or stored values, then print the tables, write the page, and list the gates that failed."""
    if settings.evaluation.report is not None:
        from critic_train.report.report_sources import check_page_path

        check_page_path(Path(settings.evaluation.report), "--report")
    view = choose_view(output, stopping="stopping", before_first_step="stopping", nproc=settings.compute.nproc)
    ended = run_job(lambda stop: critic_train.evaluate(settings, stop), view, output)

    from critic_train_cli.text_charts import draw_charts
    from critic_train_cli.verdict_tables import draw_verdict

    def draw(console: "Console") -> None:
        draw_verdict(console, ended.result)
        draw_charts(console, ended.result, [], beside_tables=True)

    output.result(ended.result or {"status": ended.status}, draw)
    if settings.evaluation.report is not None and ended.result:
        from critic_train.report.page import write_page
        from critic_train.report.report_sources import evaluation_source

        written = write_page(Path(settings.evaluation.report), [evaluation_source(ended.result)])
        output.line(f"report: {settings.evaluation.report} ({format_bytes(written)})")
    failed = [gate for gate in ended.result.get("gates") or [] if not gate["passed"]]
    for gate in failed:
        output.line(paint("failed:", RED, sys.stderr) + f" {gate['reason']} ({gate['flag']})")
    return exit_code_of(ended) or (REFUSED if failed else DONE)


EVAL = Command(
    name="eval",
    settings=EvalSettings,
    about="Say how good a critic is. Explained variance with its interval, errors and correlations stand beside "
    "four baselines: the constant mean, the stored values, the prompt group's leave-one-out mean, and the critic fused "
    "with that mean. Says how many rollouts a prompt the critic is worth.",
    examples=(
        "critic-train eval --model runs/rollouts --data held_out/",
        "critic-train eval --model runs/a --model runs/b --data held_out/ --by task",
        "critic-train eval --data rollouts/      # judges the stored values",
        "critic-train eval --model runs/a --data held_out/ --fail-under explained_variance_interval.low=0.1",
    ),
    work=run_eval,
)


def run_predict(settings: PredictSettings, output: Output) -> int:
    """Write a critic's values into shards, then print how many rows of how many files have them."""
    view = choose_view(output, stopping=CONTINUES)
    ended = run_job(lambda stop: critic_train.predict(settings, stop), view, output)
    output.result(ended.result, lambda console: draw_prediction(console, ended.result))
    return exit_code_of(ended)


def draw_prediction(console: "Console", result: dict[str, Any]) -> None:
    """Print what was written where, and the command that trains on it."""
    files = f"{result['files']} of {result['files_in_all']} files"
    if result["status"] == "interrupted":
        console.print(f"Interrupted: {files} stand in {result['to']}.", style="bold")
        console.print("The same command goes on from there.")
        return
    head = {"already finished": "Already finished"}.get(result["status"], "Finished")
    columns = ", ".join(result["columns"])
    console.print(f"{head}: {columns} of {result['rows']:,} rows in {files} in {result['to']}.", style="bold")
    bad_rows = (result["rows_left_out"] or {}).get("count")
    if bad_rows:
        console.print(f"{bad_rows:,} rows could not be used: they have nulls there.")
    # Not wrapped at the terminal's width, so that it can be copied.
    console.print(f"\nNext: {result['next']}", soft_wrap=True)


PREDICT = Command(
    name="predict",
    settings=PredictSettings,
    about="Write a critic's values into the shards. Files, rows, row groups and every other column stay as they are; "
    "returns and advantages are computed from rewards where asked. The same command run again goes on.",
    examples=(
        "critic-train predict --model runs/rollouts --data rollouts/ --to next/",
        "critic-train predict --model runs/a --data rollouts/ --to next/ --returns gae --lam 0.95",
        "critic-train predict --model runs/a --data rollouts/ --to next/ --returns mc --write advantages",
        "critic-train predict --model runs/a --data rollouts/ --to next/ --baseline fused",
    ),
    work=run_predict,
)


def run_split(settings: SplitSettings, output: Output) -> int:
    """Hold prompts out, then print how many rollouts and prompt groups are on each side."""
    view = choose_view(output, stopping=CONTINUES)
    ended = run_job(lambda stop: critic_train.split(settings, stop), view, output)
    output.result(
        {"status": ended.status, **ended.result}, lambda console: draw_split(console, ended.status, ended.result)
    )
    return exit_code_of(ended)


def draw_split(console: "Console", status: str, result: dict[str, Any]) -> None:
    """Print the sizes of both sides, and the command that trains on them."""
    if status == "interrupted":
        console.print("Interrupted. The same command goes on from there.", style="bold")
        return
    to = result["to"].rstrip("/")
    for side in ("train", "val"):
        rollouts, groups = result[side]["rollouts"], result[side]["prompt_groups"]
        console.print(f"{to}/{side}: {rollouts:,} rollouts of {groups:,} prompt groups", style="bold", soft_wrap=True)
    bad_rows = result["rows_left_out"]["count"]
    if bad_rows:
        console.print(f"{bad_rows:,} rows that could not be used are in neither.")
    console.print(f"\nNext: {result['next']}", soft_wrap=True)


SPLIT = Command(
    name="split",
    settings=SplitSettings,
    about="Hold prompts out: write shards to train on and shards to judge on. Whole prompt groups go to one side, "
    "those that fit --val-fraction --seed would hold out; files, row order and columns stay as they are.",
    examples=(
        "critic-train split rollouts/ --to split/",
        "critic-train split rollouts/ --to split/ --val-fraction 0.05 --seed 1",
    ),
    work=run_split,
)


def run_check(settings: CheckSettings, output: Output) -> int:
    """Read a data set to its end, then print what is in it and what is wrong with it."""

    def draw(console: "Console", result: dict[str, Any]) -> None:
        from critic_train_cli.check_view import draw_check

        draw_check(console, result, settings.output.show)

    return run_inspection(lambda stop: critic_train.check(settings, stop), draw, output)


CHECK = Command(
    name="check",
    settings=CheckSettings,
    about="Look a data set over before training on it. Tells how its columns are understood, every row that cannot be "
    "used, lengths and distributions, which gamma and lambda its returns were made with, what its stored values are "
    "worth, what sharing prefixes saves, prompts that leak into --against, and the flags to train with. Exit code 1 "
    "where rows or files cannot be used or prompts leak.",
    examples=(
        "critic-train check rollouts/",
        "critic-train check rollouts/train --against rollouts/val",
        "critic-train check rollouts/ --json > findings.json",
    ),
    work=run_check,
)


def run_convert(settings: ConvertSettings, output: Output) -> int:
    """Convert dumps to shards, then print how many rollouts came of each source."""
    view = choose_view(output, stopping="stopping; the same command goes on from the last whole source")
    ended = run_job(lambda stop: critic_train.convert(settings, stop), view, output)

    from critic_train_cli.command_results import draw_conversion

    output.result({"status": ended.status, **ended.result}, lambda console: draw_conversion(console, ended))
    return exit_code_of(ended)


CONVERT = Command(
    name="convert",
    settings=ConvertSettings,
    about="Make shards of the rollouts that slime, verl, NeMo-RL, OpenRLHF, SkyRL or TRL dumped, or of any JSON, "
    "Parquet, Arrow or CSV file with token ids or text. The format is recognised, and which field is what; nothing "
    "that a pickled dump names is ever run. The same command again goes on where it stopped.",
    examples=(
        "critic-train convert dumps/rollout_*.pt --to rollouts/",
        "critic-train convert verl_batches/ --to rollouts/ --on-bad-rows skip",
        "critic-train convert completions/ --to rollouts/ --tokenizer policy/ --allow-retokenize",
    ),
    work=run_convert,
)


def run_report(settings: ReportSettings, output: Output) -> int:
    """Write the page, then print a summary of what it shows."""
    from critic_train_cli.command_results import draw_report

    written = critic_train.report(settings)
    result = {
        "report": str(written.path),
        "bytes": written.size_bytes,
        "sources": [source.label for source in written.sources],
    }
    output.result(result, lambda console: draw_report(console, written, in_full=settings.page.to is None))
    return DONE


REPORT = Command(
    name="report",
    settings=ReportSettings,
    about="Write one HTML page about runs and evaluations: is this critic any good, where is it wrong, how did "
    "training go. It stands alone: no network, no script. A run of fit keeps its own page up to date.",
    examples=(
        "critic-train report runs/rollouts",
        "critic-train report runs/a runs/b --to compared.html",
        "critic-train report held_out.json --tokenizer Qwen3-0.6B/",
    ),
    work=run_report,
)


OUTCOME_LABELS = {"sound": "ok", "unsound": "BAD", "unknown": "-"}


def run_verify(settings: VerifySettings, output: Output) -> int:
    """Verify each target, then print one line a finding."""
    return run_inspection(
        lambda stop: critic_train.verify(settings, stop),
        lambda console, result: draw_outcomes(console, result["targets"]),
        output,
    )


def draw_outcomes(console: "Console", targets: list[dict[str, Any]]) -> None:
    """Print each target with its verdict, and one line a finding: ok, BAD, or - for what could not be compared."""
    for target in targets:
        verdict = "sound" if target["sound"] else "NOT SOUND"
        console.print(f"{target['target']} ({target['kind']}): {verdict}", style="bold", soft_wrap=True, markup=False)
        for finding in target["findings"]:
            line = f"  {OUTCOME_LABELS[finding['state']]:<4}{finding['what']}: {finding['said']}"
            console.print(line.replace("\n", "\n      "), soft_wrap=True, markup=False)


VERIFY = Command(
    name="verify",
    settings=VerifySettings,
    about="Say whether runs, checkpoints and rollouts are what was written. Digests of every checkpoint are held "
    "against its manifest, its weights are loaded and asked for values; a run's data and base model are compared with "
    "those it began with; shards are read to their end, page checksums included. Changes nothing. Exit code 1 where "
    "something is wrong.",
    examples=(
        "critic-train verify runs/rollouts",
        "critic-train verify runs/rollouts/best rollouts/",
        "critic-train verify runs/* --json",
    ),
    work=run_verify,
)
