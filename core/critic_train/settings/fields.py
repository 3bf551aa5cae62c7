"""How settings are declared: one field each, with its help; classes of them put together to a command's settings."""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

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
        default: the value when nothing is said; a list makes the flag repeatable.
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
class Settings:
    """Base of every command's settings and of the parts they are made of.

    A part declares fields and says in `faults` which rules its values break; a command's settings inherit from its
    parts. All broken rules of all parts are told at once.
    """

    command: ClassVar[str] = ""

    def __post_init__(self) -> None:
        parts = [part for part in reversed(type(self).__mro__) if issubclass(part, Settings) and "faults" in vars(part)]
        wrong = [fault for part in parts for fault in part.faults(self)]
        if wrong:
            raise ConfigError("\n".join(wrong), hint=f"critic-train {self.command} --help lists every flag")

    def faults(self) -> list[str]:
        """The rules that the values break, one line each, naming the flag."""
        return []


def settings_fields(settings: type[Settings] | Settings) -> "list[Field[Any]]":
    """The fields of a command's settings by panel, within a panel in the order declared."""
    return sorted(fields(settings), key=lambda declared: PANELS.index(declared.metadata["panel"]))


def flag_of(name: str) -> str:
    """The flag of a settings field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def default_of(settings: type[Settings], name: str) -> Any:
    """A setting's value when nothing is said; lists have none here."""
    return settings.__dataclass_fields__[name].default


def defaults_of(settings: type[Settings]) -> dict[str, Any]:
    """Field name -> its value when nothing is said."""
    made = ((declared, declared.default_factory) for declared in fields(settings))
    return {each.name: each.default if factory is MISSING else factory() for each, factory in made}


def shown_as(settings: Settings | type[Settings], name: str) -> str:
    """A setting as its command line shows it: `--data`, or DATA where it is positional."""
    metadata = settings.__dataclass_fields__[name].metadata
    return str(metadata["metavar"]) if metadata["positional"] else metadata["flag"] or flag_of(name)


def as_dict(settings: Settings) -> dict[str, Any]:
    """Field name -> value, in the order of the help page."""
    return {declared.name: getattr(settings, declared.name) for declared in settings_fields(settings)}


def too_small(settings: Settings, least: float, *names: str) -> list[str]:
    """A line for each of the named fields that is set and below `least`, not a number or infinite."""
    values = {name: getattr(settings, name) for name in names}
    return [
        f"{flag_of(name)} must be {'finite and ' if value == float('inf') else ''}at least {least:g}, not {value}"
        for name, value in values.items()
        if value is not None and not least <= value < float("inf")
    ]


def seed_faults(seed: int) -> list[str]:
    """What is wrong with a seed."""
    return [] if 0 <= seed < SEEDS else [f"--seed must be from 0 to 2^63 - 1, not {seed}"]
