"""`critic-train report`: put runs and evaluations on one page."""

from critic_train.settings import ReportSettings
from critic_train_cli.command import Command
from critic_train_cli.output import Output


def work(settings: ReportSettings, output: Output) -> int:
    """Write the page; then the same in short, where somebody reads along."""
    from critic_train.reporting.report import report
    from critic_train_cli.faults import DONE
    from critic_train_cli.reported import draw_report

    written = report(settings)
    told = {
        "report": str(written.path),
        "bytes": written.size_bytes,
        "sources": [source.label for source in written.sources],
    }
    output.result(told, lambda console: draw_report(console, written, in_full=settings.to is None))
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
    work=work,
)
