"""`critic-train check`: look a data set over."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from critic_train.settings.check import CheckSettings

from critic_train.events import Event
from critic_train.stopping import StopRequest
from critic_train_cli.command import Command
from critic_train_cli.looking import look_over
from critic_train_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console


def work(settings: CheckSettings, output: Output) -> int:
    """Read everything, showing how far it is; then the findings, or all of them as JSON."""

    def start(stop: StopRequest) -> Iterator[Event]:
        from critic_train.doctor.doctor import check

        yield from check(settings, stop)

    def draw(console: "Console", result: dict[str, Any]) -> None:
        from critic_train_cli.findings import draw_findings

        draw_findings(console, result, settings.show)

    return look_over(start, draw, output)


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
    work=work,
)
