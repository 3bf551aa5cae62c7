"""Make a Typer command of settings and a function: options from the settings, and the flags that all commands have."""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from critic_train.settings import Settings
from critic_train_cli.config_file import config_path, config_text, read_config
from critic_train_cli.help_page import command_page
from critic_train_cli.options import Chosen, Option, misspelt_variables, options_of, resolve
from critic_train_cli.output import Output
from critic_train_cli.terminal import is_unicode


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command of the program.

    Attributes:
        name: as on the command line.
        settings: the class that declares its options.
        about: what it does; the first sentence is also shown on the program's page.
        examples: command lines for the help page.
        work: called with the settings and the output; returns the exit code.
    """

    name: str
    settings: type[Settings]
    about: str
    examples: tuple[str, ...]
    work: Callable[[Any, Output], int]

    @property
    def summary(self) -> str:
        """The first sentence of `about`, for lists of commands."""
        return self.about.split(". ")[0].rstrip(".") + "."


def add_command(app: typer.Typer, command: Command, every: tuple[Command, ...]) -> None:
    """Add a command to the Typer app.

    Args:
        app: the Typer app.
        command: the command to add.
        every: all commands: the configuration file may have tables of others.
    """
    options = options_of(command.settings)

    def call(ctx: typer.Context, **given: Any) -> int:
        output = ctx.obj if isinstance(ctx.obj, Output) else Output()
        output.as_json |= given["json"]
        output.quiet |= given["quiet"]
        output.debug |= given["debug"]
        variables = [option.variable for other in every for option in options_of(other.settings)]
        for message in misspelt_variables(os.environ, variables):
            output.notice(message, "warning")
        chosen = chosen_settings(command, options, given, every)
        if given["print_config"]:
            print_config(command, options, chosen, output)
            return 0
        settings = command.settings(**{name: value.value for name, value in chosen.items()})
        return command.work(settings, output)

    parameters = [parameter_of(option) for option in options] + common_parameters(command, options)
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    call.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in (context, *parameters)}
    app.command(command.name, help=command.about, add_help_option=False)(call)


def chosen_settings(
    command: Command, options: list[Option], given: dict[str, Any], every: tuple[Command, ...]
) -> dict[str, Chosen]:
    """Each setting's value and origin: flags, environment, configuration file or default."""
    path = config_path(given["config"])
    file: dict[str, Chosen] = {}
    if path:
        file = read_config(path, command.name, {other.name: options_of(other.settings) for other in every})
    return resolve(options, given, os.environ, file)


def print_config(command: Command, options: list[Option], chosen: dict[str, Chosen], output: Output) -> None:
    """Print every setting and its origin, as TOML or as JSON."""
    result = {name: {"value": value.value, "source": value.source} for name, value in chosen.items()}
    text = config_text(command.name, options, chosen, escape=not is_unicode(sys.stdout))
    output.result(result, lambda console: output.text(text))


def parameter_of(option: Option) -> inspect.Parameter:
    """A setting as a parameter of Typer's: a string, parsed later by `resolve`; None or False where it is not given."""
    choices = list(option.choices)
    default: Any
    kind: Any
    if option.positional:
        default, kind = typer.Argument(None, help=option.help, metavar=option.metavar), list[str] | None
    elif option.kind is bool:
        # The flag is named because Typer would otherwise add --no-no-clip beside --no-clip.
        default, kind = typer.Option(False, option.flag, help=option.help), bool
    else:
        complete = (lambda: choices) if choices else None
        default = typer.Option(None, option.flag, help=option.help, metavar=option.metavar, autocompletion=complete)
        kind = list[str] | None if option.repeatable else str | None
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def common_parameters(command: Command, options: list[Option]) -> list[inspect.Parameter]:
    """The flags that every command has besides its settings."""

    def show_help(ctx: typer.Context, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            print(command_page(ctx.command_path, command.about, options, command.examples))
            raise typer.Exit(0)

    declared: dict[str, tuple[Any, Any]] = {
        "config": (str | None, typer.Option(None, "--config", help="Read settings from a TOML file.")),
        "print_config": (bool, typer.Option(False, "--print-config", help="Print each setting and its origin.")),
        "json": (bool, typer.Option(False, "--json", help="Print the result as one JSON object.")),
        "quiet": (bool, typer.Option(False, "--quiet", "-q", help="No progress and no notices.")),
        "debug": (bool, typer.Option(False, "--debug", help="Show the traceback of an error.")),
        "help": (
            bool,
            typer.Option(False, "--help", "-h", is_eager=True, callback=show_help, help="Show the help page."),
        ),
    }
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in declared.items()
    ]
