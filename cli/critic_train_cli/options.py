"""A command's options, derived from its settings: declared once, shown and read everywhere.

Typer splits the command line and completes it; it hands every value over as text. Reading the text is done
here, by one rule for flags and environment alike, so that a complaint can name where the value came from.
"""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from critic_train.errors import ConfigError
from critic_train.settings import Settings, flag_of, settings_fields

VARIABLE_PREFIX = "CRITIC_TRAIN_"
LARGEST = 2**64
"""Whole numbers lie below it; what is larger fits no machine's numbers."""
OTHER_VARIABLES = ("CRITIC_TRAIN_CONFIG", "CRITIC_TRAIN_DEBUG", "CRITIC_TRAIN_PROGRESS")
TRUE_WORDS, FALSE_WORDS = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting as the command line sees it.

    Attributes:
        name: the field of a section of the settings.
        flag: the long flag; the metavar where there is none.
        positional: whether the values stand on the command line without a flag.
        kind: type of one value.
        choices: the words allowed, or none where any value of the kind is.
        repeatable: whether the setting is a list, given by repeating the flag.
        default: what holds when nothing is said.
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
        """What one value must be, in words."""
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
    """One field as an option; its type says how a value is read."""
    hint: Any = field.type
    if get_origin(hint) in (Union, UnionType):
        hint = next(inner for inner in get_args(hint) if inner is not type(None))
    repeatable = get_origin(hint) is list
    if repeatable:
        hint = get_args(hint)[0]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = str if choices else hint
    told = field.metadata
    help, _, unset = told["help"].partition(" [default: ")
    shown = {int: "N", float: "X", bool: "", str: "TEXT"}
    metavar = told.get("metavar") or "|".join(choices) or shown[kind]
    return Option(
        name=field.name,
        flag=metavar if told["positional"] else told.get("flag") or flag_of(field.name),
        kind=kind,
        choices=choices,
        repeatable=repeatable,
        default=[] if field.default is MISSING else field.default,
        unset=unset.rstrip("]"),
        help=help,
        panel=told["panel"],
        metavar=metavar,
        positional=told["positional"],
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
        flags: name -> what the command line gave: text, a list of texts, True, or nothing (None, False, []).
        environment: the environment variables; an empty one counts as not set.
        file: what the configuration file gave.

    Raises:
        ConfigError: a text cannot be read as its setting's type; names every such text at once.
    """
    wrong: list[str] = []
    chosen: dict[str, Chosen] = {}

    def read(option: Option, given: Any, source: str) -> None:
        try:
            chosen[option.name] = Chosen(read_value(option, given), source)
        except ValueError as error:
            wrong.append(f"{source.removeprefix('flag ')} {error}")

    for option in options:
        given, variable = flags.get(option.name), environment.get(option.variable)
        if given not in (None, False, [], ()):
            read(option, given, f"flag {option.flag}")
        elif variable:
            read(option, variable, f"environment {option.variable}")
        else:
            chosen[option.name] = file.get(option.name, Chosen(option.default, "default"))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return chosen


def read_value(option: Option, given: Any) -> Any:
    """A flag's or variable's text as the setting's value.

    Args:
        option: the setting.
        given: one text; for a repeatable setting a list of texts, or one text whose words are split as a
            shell would; True for a flag that takes no value.

    Raises:
        ValueError: the text is no such value; reads on from the flag's name.
    """
    if option.repeatable:
        try:
            words = shlex.split(given) if isinstance(given, str) else given
        except ValueError as error:
            raise ValueError(f"cannot be split into words ({str(error).lower()}): {given!r}") from None
        return [read_one(option, word) for word in words]
    return given if given is True else read_one(option, given)


def read_one(option: Option, text: str) -> Any:
    """One text as one value of the setting's kind."""
    value: Any = text
    try:
        if option.kind is bool:
            value = text.strip().lower() in TRUE_WORDS
            if not value and text.strip().lower() not in FALSE_WORDS:
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


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean X?` for the closest known word, or nothing."""
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def misspelt_variables(environment: Mapping[str, str], known: list[str]) -> list[str]:
    """Warnings about CRITIC_TRAIN_ variables that are nobody's but look like somebody's."""
    # Compared without the prefix, which alone would make any two alike.
    bare = [name.removeprefix(VARIABLE_PREFIX) for name in (*known, *OTHER_VARIABLES)]
    given = [name.removeprefix(VARIABLE_PREFIX) for name in sorted(environment) if name.startswith(VARIABLE_PREFIX)]
    meant = {name: get_close_matches(name, bare, n=1, cutoff=0.8) for name in given if name not in bare}
    return [
        f"{VARIABLE_PREFIX}{name} in the environment is no setting; did you mean {VARIABLE_PREFIX}{close[0]}?"
        for name, close in meant.items()
        if close
    ]
