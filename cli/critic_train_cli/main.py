"""The entry point of `critic-train`: parses the command line, runs the command, and exits with its code."""

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
from critic_train_cli.hand_over_commands import EXPORT, SHOW
from critic_train_cli.help_page import program_page
from critic_train_cli.options import VARIABLE_PREFIX
from critic_train_cli.output import Output
from critic_train_cli.signals import exit_on_closed_pipe
from critic_train_cli.terminal import escape_unencodable_output, open_closed_descriptors

ABOUT = "Train and judge PPO critics offline, from Parquet rollouts."
COMMANDS = (FIT, EVAL, PREDICT, REPORT, CHECK, SPLIT, CONVERT, VERIFY, EXPORT, SHOW)
OUTPUT_FLAGS = {"--json", "--quiet", "-q", "--debug"}
"""Flags that are no settings."""
COMPLETION = (
    ("--install-completion", "Install completion for the current shell."),
    ("--show-completion", "Print the completion script of the current shell."),
)


def is_completion_call() -> bool:
    """Whether this call is about shell completion.

    Typer's two completion options cost 0.07 s on every call, because they import pydantic. So they are added only where
    they are used; the help page always lists them.
    """
    flags = {name for name, _ in COMPLETION}
    return "_CRITIC_TRAIN_COMPLETE" in os.environ or not flags.isdisjoint(sys.argv[1:])


app = typer.Typer(
    name="critic-train",
    help=ABOUT,
    add_completion=is_completion_call(),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def show_version(value: bool) -> None:
    """Print the version and exit."""
    if value:
        print(f"critic-train {__version__}")
        raise typer.Exit(DONE)


def show_help(ctx: typer.Context, value: bool) -> None:
    """Print the program's help page and exit."""
    if value and not ctx.resilient_parsing:
        print(page())
        raise typer.Exit(DONE)


def page() -> str:
    """The program's help page."""
    commands = [(command.name, command.summary) for command in COMMANDS]
    flags = [("--version", "Print the version."), *COMPLETION, ("--help, -h", "Show this page.")]
    return program_page(ABOUT, commands, flags)


@app.callback(invoke_without_command=True, add_help_option=False)
def critic_train(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", is_eager=True, callback=show_version),
    help: bool = typer.Option(False, "--help", "-h", is_eager=True, callback=show_help),
) -> None:
    """Without a command, print the help page on stderr; the exit code is that of a wrong command line."""
    if ctx.invoked_subcommand is None:
        print(page(), file=sys.stderr)
        raise typer.Exit(USAGE)


for each in COMMANDS:
    add_command(app, each, COMMANDS)


def wants_json(arguments: list[str]) -> bool:
    """Whether --json is given. Looked up before the command line is parsed, whose errors are printed as JSON too."""
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in flags


def wants_no_messages(arguments: list[str], environment: Mapping[str, str]) -> bool:
    """Whether this is a rank other than 0 of a command that runs on several ranks together, as torchrun started it.

    `predict` is no such command: each of its processes works alone and prints its own messages.
    """
    has_ranks = any("nproc" in defaults_of(each.settings) for each in COMMANDS if each.name in arguments[:1])
    return has_ranks and environment.get("WORLD_SIZE", "1") != "1" and environment.get("RANK", "0") != "0"


def refuse_bare_command(arguments: list[str]) -> None:
    """Refuse a command without settings that needs some, before Typer imports pydantic (0.1 s) to parse none.

    Raises:
        ConfigError: the command's settings cannot all be defaults.
    """
    has_variables = any(name.startswith(VARIABLE_PREFIX) for name in os.environ)
    for command in COMMANDS:
        if arguments[:1] == [command.name] and set(arguments[1:]) <= OUTPUT_FLAGS and not has_variables:
            command.settings()


def run() -> NoReturn:
    """The console script: run the command, and exit with the documented code."""
    open_closed_descriptors()
    escape_unencodable_output()
    exit_on_closed_pipe()
    # torch writes pages to stderr when another rank has died; our own error says so in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # torch reads this when it is imported. Micro-batches differ in size; segments of fixed sizes would hold gigabytes
    # that no tensor fits into.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    arguments = sys.argv[1:]
    debug = os.environ.get("CRITIC_TRAIN_DEBUG", "0").lower() not in ("", "0", "false", "no", "off")
    output = Output(
        as_json=wants_json(arguments),
        debug=debug or "--debug" in arguments,
        silent=wants_no_messages(arguments, os.environ),
    )
    try:
        refuse_bare_command(arguments)
        code = app(args=arguments, prog_name="critic-train", standalone_mode=False, obj=output)
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
    except BaseException as error:
        code = output.error(error)
        discard_stdout()
    sys.exit(code if isinstance(code, int) else DONE)


def discard_stdout() -> None:
    """Replace a stdout that cannot be flushed by /dev/null, so that the interpreter does not fail on it at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
