"""`critic-train convert`: shards out of other systems' rollout dumps."""

from collections.abc import Iterator

from critic_train.events import Event
from critic_train.settings import ConvertSettings
from critic_train.stopping import StopRequest
from critic_train_cli.command import Command
from critic_train_cli.output import Output


def work(settings: ConvertSettings, output: Output) -> int:
    """Convert, showing how far it is; then what was made of what."""
    from critic_train_cli.job import exit_code_of, run_job
    from critic_train_cli.view_choice import choose_view

    def start(stop: StopRequest) -> Iterator[Event]:
        from critic_train.converting.conversion import convert

        yield from convert(settings, stop)

    view = choose_view(output, stopping="stopping; the same command goes on from the last whole source")
    ended = run_job(start, view, output)

    from critic_train_cli.conversions import draw_conversion

    output.result({"status": ended.status, **ended.result}, lambda console: draw_conversion(console, ended))
    return exit_code_of(ended)


CONVERT = Command(
    name="convert",
    settings=ConvertSettings,
    about="Make shards of the rollouts that slime, verl, NeMo-RL, OpenRLHF or TRL dumped, or of any JSONL or Parquet "
    "with token ids or text. The format is recognised; nothing that a pickled dump names is ever run. The same command "
    "again goes on where it stopped.",
    examples=(
        "critic-train convert dumps/rollout_*.pt --to rollouts/",
        "critic-train convert verl_batches/ --to rollouts/ --on-bad-rows skip",
        "critic-train convert completions/ --to rollouts/ --tokenizer policy/ --allow-retokenize",
    ),
    work=work,
)
