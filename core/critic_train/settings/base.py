"""How settings are declared: one dataclass field each, in sections, of which a command's settings are composed."""

from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

from critic_train.errors import ConfigError

PANELS = ("Data", "Returns", "Model", "Loss", "Training", "Compute", "Judgement", "Run", "Output")
"""The groups of the help page, in its order."""

SEEDS = 2**63
"""Seeds are below it: what torch and numpy both take."""


def setting(
    default: Any,
    help: str,
    *,
    panel: str,
    metavar: str | None = None,
    flag: str | None = None,
    positional: bool = False,
) -> Any:
    """A dataclass field that carries its own help.

    Args:
        default: the value where none is given; a list makes the flag repeatable.
        help: one sentence for the help page and the docs; "[default: ...]" at its end says what None means.
        panel: the group of PANELS under which the help page shows it.
        metavar: what the help shows in place of the type.
        flag: the flag's name where it is not `--` + the field's name with dashes.
        positional: whether it is given without a flag, as in `critic-train report RUN`; such a setting is a list.
    """
    metadata = {"help": help, "panel": panel, "metavar": metavar, "flag": flag, "positional": positional}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of the sections: settings that are used together, each declared with `setting`.

    A field's type says how its flag is read, so modules that declare sections must not postpone annotations.
    """

    def validate(self) -> list[str]:
        """The rules that the values break, one line each, naming the flag."""
        return []


@dataclass(frozen=True, init=False)
class Settings:
    """Base of every command's settings: a dataclass whose fields are sections.

    Settings are read by section, as in `settings.optimizer.lr`. They are given and recorded without: flags, the
    configuration file, run.json and the constructor name the field alone, so no two sections of a command share one.

    Args:
        values: field name -> value, of whichever section; what is not given has its default.

    Raises:
        ConfigError: values are of the wrong type or break rules; all of them, of all sections, are in the message.
        TypeError: no section has a field of that name.
    """

    command: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        for name, section in sections_of(type(self)).items():
            given = {each.name: values.pop(each.name) for each in fields(section) if each.name in values}
            object.__setattr__(self, name, section(**given))
        if values:
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(values)}")
        errors = [error for section in self.sections() for error in type_errors(section)]
        errors = errors or [error for section in self.sections() for error in section.validate()] + self.validate()
        if errors:
            raise ConfigError("\n".join(errors), hint=f"critic-train {self.command} --help lists every flag")

    def sections(self) -> list[Section]:
        """The sections, in the order declared."""
        return [getattr(self, name) for name in sections_of(type(self))]

    def validate(self) -> list[str]:
        """The rules between sections that the values break, one line each, naming the flag."""
        return []

    def replace(self, **changes: Any) -> Self:
        """A copy with other values; arguments and errors as in the constructor."""
        return type(self)(**as_dict(self) | changes)


EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, slots=True)
class ValueType:
    """The type of a setting.

    Attributes:
        kind: type of one value: str, int, float or bool.
        choices: the values allowed; empty where any value of the type is.
        repeatable: whether the setting is a list of values.
        optional: whether it may be None.
    """

    kind: type
    choices: tuple[str, ...]
    repeatable: bool
    optional: bool

    def accepts(self, value: Any) -> bool:
        """Whether a value has this type. An int counts as a float; a bool counts as neither."""
        if value is None:
            return self.optional
        if self.repeatable:
            return isinstance(value, list) and all(map(self._accepts_one, value))
        return self._accepts_one(value)

    def _accepts_one(self, value: Any) -> bool:
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float if self.kind is float else self.kind)


def value_type(declared: "Field[Any]") -> ValueType:
    """Take the annotation of a setting apart: `int`, `str | None`, `list[str]`, `Literal[...]`, ..."""
    hint: Any = declared.type
    optional = get_origin(hint) in (Union, UnionType)
    if optional:
        hint = next(inner for inner in get_args(hint) if inner is not NoneType)
    repeatable = get_origin(hint) is list
    if repeatable:
        hint = get_args(hint)[0]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return ValueType(str if choices else hint, choices, repeatable, optional)


def type_errors(section: Section) -> list[str]:
    """A line for each value that is not of its setting's type, as a Python caller may give it."""
    errors = []
    for each in fields(section):
        expected, value = value_type(each), getattr(section, each.name)
        if not expected.accepts(value):
            one = f"one of {', '.join(expected.choices)}" if expected.choices else EXPECTED[expected.kind]
            wanted = f"a list, each {one}" if expected.repeatable else one
            errors.append(f"{name_in_usage(section, each.name)} must be {wanted}, not {value!r}")
    return errors


def sections_of(settings: type[Settings]) -> dict[str, type[Section]]:
    """Attribute name -> section, in the order declared."""
    return {declared.name: declared.type for declared in fields(settings)}  # type: ignore[misc]


def settings_fields(settings: type[Settings]) -> "list[Field[Any]]":
    """The fields of a command's settings by panel, within a panel in the order declared."""
    declared = [each for section in sections_of(settings).values() for each in fields(section)]
    return sorted(declared, key=lambda each: PANELS.index(each.metadata["panel"]))


def as_dict(settings: Settings) -> dict[str, Any]:
    """Field name -> value, in the order of the help page."""
    values = {name: value for section in settings.sections() for name, value in vars(section).items()}
    return {declared.name: values[declared.name] for declared in settings_fields(type(settings))}


def defaults_of(settings: type[Settings]) -> dict[str, Any]:
    """Field name -> default, in the order of the help page."""
    return {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in settings_fields(settings)
    }


def flag_of(name: str) -> str:
    """The flag of a settings field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def name_in_usage(section: Section, name: str) -> str:
    """A setting as its command line writes it: `--data`, or DATA where it is positional."""
    metadata = section.__dataclass_fields__[name].metadata
    return str(metadata["metavar"]) if metadata["positional"] else metadata["flag"] or flag_of(name)


def minimum_errors(section: Section, minimum: float, *names: str) -> list[str]:
    """A line for each of the named fields that is set and below `minimum`, not a number or infinite."""
    values = {name: getattr(section, name) for name in names}
    return [
        f"{flag_of(name)} must be {'finite and ' if value == float('inf') else ''}at least {minimum:g}, not {value}"
        for name, value in values.items()
        if value is not None and not minimum <= value < float("inf")
    ]


def seed_errors(seed: int) -> list[str]:
    """A line where a seed is out of range."""
    return [] if 0 <= seed < SEEDS else [f"--seed must be from 0 to 2^63 - 1, not {seed}"]
