"""`critic-train verify`: whether runs, checkpoints and rollouts are what was written."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from critic_train.settings.verify import VerifySettings

from critic_train.events import Event
from critic_train.stopping import StopRequest
from critic_train_cli.command import Command
from critic_train_cli.looking import look_over
from critic_train_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

WORDS = {"sound": "ok", "unsound": "BAD", "unknown": "-"}


def work(settings: VerifySettings, output: Output) -> int:
    """Look at each target; then a line a finding, or all of them as JSON."""

    def start(stop: StopRequest) -> Iterator[Event]:
        from critic_train.verifying.verification import verify

        yield from verify(settings, stop)

    return look_over(start, lambda console, result: draw(console, result["targets"]), output)


def draw(console: "Console", targets: list[dict[str, Any]]) -> None:
    """A block a target, a line a finding: its verdict, what it is of, and what was looked at or is wrong."""
    for target in targets:
        verdict = "sound" if target["sound"] else "NOT SOUND"
        console.print(f"{target['target']} ({target['kind']}): {verdict}", style="bold", soft_wrap=True, markup=False)
        for finding in target["findings"]:
            line = f"  {WORDS[finding['state']]:<4}{finding['what']}: {finding['said']}"
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
    work=work,
)
