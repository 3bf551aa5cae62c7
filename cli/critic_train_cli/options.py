"""A command's options, derived from its settings; values from flags, environment and configuration file.

Typer splits and completes the command line, and hands every value over as text. The text is parsed here, the same way
for flags and environment variables, so that an error can name where the value came from.
"""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass
from difflib import get_close_matches
from typing import Any

from critic_train.errors import ConfigError
from critic_train.settings import EXPECTED, Settings, flag_of, settings_fields, value_type

VARIABLE_PREFIX = "CRITIC_TRAIN_"
LARGEST = 2**64
"""Integers must be smaller in magnitude."""
OTHER_VARIABLES = ("CRITIC_TRAIN_CONFIG", "CRITIC_TRAIN_DEBUG", "CRITIC_TRAIN_PROGRESS")
TRUE_TEXTS, FALSE_TEXTS = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting as the command line sees it.

    Attributes:
        name: the field of a section of the settings.
        flag: the long flag; the metavar where there is none.
        positional: whether the values are given without a flag.
        kind: type of one value.
        choices: the values allowed; empty where any value of the type is.
        repeatable: whether the setting is a list, given by repeating the flag.
        default: the value where none is given.
        unset: what None means, for the help page ("3 % of the run"), or an empty string.
        help, panel, metavar: for the help page.
    """

    name: str
    flag: str
    kind: type
    choices: tuple[str, ...]
    repeatable: bool
    default: Any
    unset: str
    help: str
    panel: str
    metavar: str
    positional: bool = False

    @property
    def variable(self) -> str:
        """The environment variable that gives this setting."""
        return VARIABLE_PREFIX + self.name.upper()

    @property
    def expected(self) -> str:
        """What one value must be, for an error message."""
        return f"one of {', '.join(self.choices)}" if self.choices else EXPECTED[self.kind]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A value and where it came from: "flag --lr", "environment CRITIC_TRAIN_LR", "file a.toml", "default"."""

    value: Any
    source: str


def options_of(settings: type[Settings]) -> list[Option]:
    """The options of a command's settings, in the order of the help page."""
    return [option_of(field) for field in settings_fields(settings)]


def option_of(field: "Field[Any]") -> Option:
    """One field as an option; its type decides how a value is parsed."""
    declared, metadata = value_type(field), field.metadata
    help, _, unset = metadata["help"].partition(" [default: ")
    metavars = {int: "N", float: "X", bool: "", str: "TEXT"}
    metavar = metadata.get("metavar") or "|".join(declared.choices) or metavars[declared.kind]
    return Option(
        name=field.name,
        flag=metavar if metadata["positional"] else metadata.get("flag") or flag_of(field.name),
        kind=declared.kind,
        choices=declared.choices,
        repeatable=declared.repeatable,
        default=[] if field.default is MISSING else field.default,
        unset=unset.rstrip("]"),
        help=help,
        panel=metadata["panel"],
        metavar=metavar,
        positional=metadata["positional"],
    )


def resolve(
    options: list[Option],
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Mapping[str, Chosen],
) -> dict[str, Chosen]:
    """Each setting's value: flag over environment over file over default.

    Args:
        options: the options of the command.
        flags: name -> from the command line: a string, a list of strings, True, or nothing (None, False, []).
        environment: the environment variables; an empty one counts as not set.
        file: name -> value from the configuration file.

    Raises:
        ConfigError: values cannot be parsed as their setting's type; all of them are named.
    """
    errors: list[str] = []
    chosen: dict[str, Chosen] = {}

    def read(option: Option, given: Any, source: str) -> None:
        try:
            chosen[option.name] = Chosen(read_value(option, given), source)
        except ValueError as error:
            errors.append(f"{source.removeprefix('flag ')} {error}")

    for option in options:
        given, variable = flags.get(option.name), environment.get(option.variable)
        if given not in (None, False, [], ()):
            read(option, given, f"flag {option.flag}")
        elif variable:
            read(option, variable, f"environment {option.variable}")
        else:
            chosen[option.name] = file.get(option.name, Chosen(option.default, "default"))
    if errors:
        raise ConfigError("\n".join(errors))
    return chosen


def read_value(option: Option, given: Any) -> Any:
    """Parse the text of a flag or variable.

    Args:
        option: the setting.
        given: a string; for a repeatable setting a list of strings, or one string that is split as a shell would;
            True for a flag without a value.

    Raises:
        ValueError: the text is no such value. The message continues a sentence that begins with the flag.
    """
    if option.repeatable:
        try:
            texts = shlex.split(given) if isinstance(given, str) else given
        except ValueError as error:
            raise ValueError(f"cannot be split into words ({str(error).lower()}): {given!r}") from None
        return [read_one(option, text) for text in texts]
    return given if given is True else read_one(option, given)


def read_one(option: Option, text: str) -> Any:
    """Parse one value; errors as in `read_value`."""
    value: Any = text
    try:
        if option.kind is bool:
            value = text.strip().lower() in TRUE_TEXTS
            if not value and text.strip().lower() not in FALSE_TEXTS:
                raise ValueError
        elif option.kind is not str:
            value = option.kind(text)
            if option.kind is int and not -LARGEST < value < LARGEST:
                raise ValueError
    except ValueError:
        raise ValueError(f"must be {option.expected}, not {text!r}") from None
    if option.choices and value not in option.choices:
        meant = did_you_mean(text, option.choices)
        raise ValueError(f"must be {option.expected}, not {text!r}{meant}")
    return value


def did_you_mean(text: str, candidates: list[str] | tuple[str, ...]) -> str:
    """`; did you mean X?` for the closest candidate, or an empty string where none is close."""
    close = get_close_matches(text, candidates, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def misspelt_variables(environment: Mapping[str, str], variables: list[str]) -> list[str]:
    """Warnings about CRITIC_TRAIN_ variables that are no setting, with the one that was probably meant.

    Args:
        environment: the environment variables.
        variables: those of all settings.
    """
    # Compared without the prefix, which would make any two similar.
    bare = [name.removeprefix(VARIABLE_PREFIX) for name in (*variables, *OTHER_VARIABLES)]
    given = [name.removeprefix(VARIABLE_PREFIX) for name in sorted(environment) if name.startswith(VARIABLE_PREFIX)]
    warnings = []
    for name in given:
        if name not in bare:
            close = get_close_matches(name, bare, n=1)
            meant = f"; did you mean {VARIABLE_PREFIX}{close[0]}?" if close else ", and changes nothing"
            warnings.append(f"{VARIABLE_PREFIX}{name} in the environment is no setting{meant}")
    return warnings
