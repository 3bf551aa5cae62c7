"""The program `critic-train`: its commands, and the one place where an error becomes an exit code."""

import os
import sys
from collections.abc import Mapping
from typing import NoReturn

import typer

from critic_train import __version__
from critic_train.settings import defaults_of
from critic_train_cli.command import add_command
from critic_train_cli.commands import CHECK, CONVERT, EVAL, FIT, PREDICT, REPORT, SPLIT, VERIFY
from critic_train_cli.exit_codes import DONE, USAGE
from critic_train_cli.help_page import program_page
from critic_train_cli.options import VARIABLE_PREFIX
from critic_train_cli.output import Output
from critic_train_cli.signals import exit_on_closed_pipe
from critic_train_cli.terminal import open_closed_descriptors, replace_undecodable_output

ABOUT = "Train and judge PPO critics offline, from Parquet rollouts."
COMMANDS = (FIT, EVAL, PREDICT, REPORT, CHECK, SPLIT, CONVERT, VERIFY)
BARE_FLAGS = {"--json", "--quiet", "-q", "--debug"}
"""Flags that say nothing of the settings."""
COMPLETION = (
    ("--install-completion", "Install completion for the current shell."),
    ("--show-completion", "Print the completion script of the current shell."),
)


def completion_wanted() -> bool:
    """Whether this call is about shell completion.

    Typer's own two options cost 0.07 s on every call, by way of pydantic. So they are added only where they
    are used; the help page names them always.
    """
    asked = any(argument in {name for name, _ in COMPLETION} for argument in sys.argv[1:])
    return asked or "_CRITIC_TRAIN_COMPLETE" in os.environ


app = typer.Typer(
    name="critic-train",
    help=ABOUT,
    add_completion=completion_wanted(),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def show_version(value: bool) -> None:
    """Print the version and end."""
    if value:
        print(f"critic-train {__version__}")
        raise typer.Exit(DONE)


def show_help(ctx: typer.Context, value: bool) -> None:
    """Print the program's page and end."""
    if value and not ctx.resilient_parsing:
        print(page())
        raise typer.Exit(DONE)


def page() -> str:
    """The program's help page."""
    commands = [(command.name, command.about.split(". ")[0].rstrip(".") + ".") for command in COMMANDS]
    flags = [("--version", "Print the version."), *COMPLETION, ("--help, -h", "Show this page.")]
    return program_page(ABOUT, commands, flags)


@app.callback(invoke_without_command=True, add_help_option=False)
def critic_train(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", is_eager=True, callback=show_version),
    help: bool = typer.Option(False, "--help", "-h", is_eager=True, callback=show_help),
) -> None:
    """Without a command, show the page; that is still a wrong command line."""
    if ctx.invoked_subcommand is None:
        print(page(), file=sys.stderr)
        raise typer.Exit(USAGE)


for each in COMMANDS:
    add_command(app, each, COMMANDS)


def json_asked(arguments: list[str]) -> bool:
    """Whether errors should be JSON; known before parsing, for a wrong command line is an error too."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in before


def wants_no_messages(arguments: list[str], environment: Mapping[str, str]) -> bool:
    """Whether this is one of several ranks (torchrun says so) that work together, and not rank 0, which speaks for all.

    The ranks of `predict` each do a part by themselves, and each speaks.
    """
    together = any("nproc" in defaults_of(each.settings) for each in COMMANDS if each.name in arguments[:1])
    return together and environment.get("WORLD_SIZE", "1") != "1" and environment.get("RANK", "0") != "0"


def refuse_bare_command(arguments: list[str]) -> None:
    """Say what a command lacks that is called without any setting.

    Typer would say the same, but it loads pydantic (0.1 s) to read values that are not there.

    Raises:
        ConfigError: the command's settings cannot all be defaults.
    """
    said_elsewhere = any(name.startswith(VARIABLE_PREFIX) for name in os.environ)
    for command in COMMANDS:
        if arguments[:1] == [command.name] and set(arguments[1:]) <= BARE_FLAGS and not said_elsewhere:
            command.settings()


def run() -> NoReturn:
    """The entry point of the console script: parse, do the work, and end with the documented exit code."""
    open_closed_descriptors()
    replace_undecodable_output()
    exit_on_closed_pipe()
    # torch writes pages to stderr when another rank is gone; a fault of ours says it in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = sys.argv[1:]
    debug = os.environ.get("CRITIC_TRAIN_DEBUG", "0").lower() not in ("", "0", "false", "no", "off")
    output = Output(
        as_json=json_asked(arguments),
        debug=debug or "--debug" in arguments,
        silent=wants_no_messages(arguments, os.environ),
    )
    try:
        refuse_bare_command(arguments)
        code = app(args=arguments, prog_name="critic-train", standalone_mode=False, obj=output)
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException as error:
        code = output.error(error)
        discard_stdout()
    sys.exit(code if isinstance(code, int) else DONE)


def discard_stdout() -> None:
    """Drop what stdout could not take, so that the interpreter does not fail on it again while it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
