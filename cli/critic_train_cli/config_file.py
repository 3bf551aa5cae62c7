"""Settings in a TOML file: read strictly, and written so that they can be read back."""

import json
import os
from collections.abc import Mapping
from typing import Any

from critic_train.errors import ConfigError
from critic_train_cli.options import LARGEST, Chosen, Option, did_you_mean

CANNOT_READ = "a configuration file is TOML; --print-config writes one"
MOST_BYTES = 2**20


def read_config(path: str, command: str, options: Mapping[str, list[Option]]) -> dict[str, Chosen]:
    """The settings that a file gives one command.

    Keys are field names with `-` or `_`. They stand at the top, or under the command's own table, which wins.

    Args:
        path: the file.
        command: the command that asks, as in `[fit]`.
        options: every command's options; their tables may stand in the same file.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value has the wrong type; all at once.
    """
    tables = load_toml(path)
    wrong: list[str] = []
    own = tables.pop(command, {})
    for other in [name for name in tables if name in options and isinstance(tables[name], dict)]:
        _, faults = read_table(tables.pop(other), options[other], f"{path}: [{other}] ")
        wrong += faults
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: {command} must be a table, written [{command}]")
    values, faults = read_table(tables, options[command], f"{path}: ", {"others": options, "command": command})
    wrong += faults
    more, faults = read_table(own, options[command], f"{path}: [{command}] ")
    wrong += faults
    if wrong:
        hint = f"critic-train {command} --print-config shows every key"
        raise ConfigError("\n".join(wrong), hint=hint)
    return {name: Chosen(value, f"file {path}") for name, value in (values | more).items()}


def load_toml(path: str) -> dict[str, Any]:
    """The file's tables; a file that is missing or is no TOML becomes a ConfigError."""
    import tomllib

    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{path} has more than {MOST_BYTES:,} bytes: it is no configuration", hint=CANNOT_READ)
        return tomllib.loads(content.decode())
    except FileNotFoundError:
        raise ConfigError(f"--config: no file {path}", hint=CANNOT_READ) from None
    except IsADirectoryError:
        raise ConfigError(f"--config: {path} is a folder", hint=CANNOT_READ) from None
    except RecursionError:
        raise ConfigError(f"{path} is no valid TOML: it is nested too deeply", hint=CANNOT_READ) from None
    except ValueError as error:  # TOML's own, what is no UTF-8, and numbers of thousands of digits
        raise ConfigError(f"{path} is no valid TOML: {error}", hint=CANNOT_READ) from None


def read_table(
    table: Mapping[str, Any], options: list[Option], place: str, context: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """One table's values by field name, and what is wrong with it."""
    by_name = {option.name: option for option in options}
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in by_name:
            wrong.append(f"{place}{unknown_key(key, list(by_name), context)}")
        elif name in values:
            wrong.append(f"{place}{name} is given twice, once with - and once with _")
        elif not is_of_kind(by_name[name], value):
            wrong.append(f"{place}{key} must be {expected_of(by_name[name])}, not {toml_text(value)}")
        else:
            values[name] = as_setting(by_name[name], value)
    return values, wrong


def unknown_key(key: str, known: list[str], context: Mapping[str, Any] | None) -> str:
    """Words for a key that is no setting here, with where or what was probably meant."""
    name = key.replace("-", "_")
    if context:
        others = [c for c, options in context["others"].items() if name in {o.name for o in options}]
        if others:
            return f"{key} is a setting of {others[0]}, not of {context['command']}; put it under [{others[0]}]"
        known = [*known, *context["others"]]
    return f"unknown key {key}{did_you_mean(name, known)}"


def expected_of(option: Option) -> str:
    """What the file must give for a setting, in words."""
    return f"{option.expected} or a list of such" if option.repeatable else option.expected


def is_of_kind(option: Option, value: Any) -> bool:
    """Whether a TOML value has the setting's type: strictly, but a whole number is a number."""
    if option.repeatable and isinstance(value, list):
        return all(is_one_of_kind(option, inner) for inner in value)
    return is_one_of_kind(option, value)


def is_one_of_kind(option: Option, value: Any) -> bool:
    """The same for one value. TOML's true is no number, although Python's is."""
    if option.choices:
        return isinstance(value, str) and value in option.choices
    if isinstance(value, bool) or option.kind is bool:
        return isinstance(value, bool) and option.kind is bool
    if isinstance(value, int) and not -LARGEST < value < LARGEST:
        return False
    return isinstance(value, int | float if option.kind is float else option.kind)


def as_setting(option: Option, value: Any) -> Any:
    """The value as the settings dataclass holds it: a list stays or becomes one, 1 becomes 1.0 for a float."""
    if option.repeatable:
        return value if isinstance(value, list) else [value]
    return float(value) if option.kind is float else value


def config_text(command: str, options: list[Option], chosen: Mapping[str, Chosen], *, escape: bool = False) -> str:
    """Every setting with its origin, as TOML that `--config` reads back.

    Args:
        command: the command, whose table this becomes.
        options: its options.
        chosen: their values.
        escape: write characters beyond ASCII as escapes, for a stream that cannot encode them.
    """
    lines = [f"# critic-train {command}: every setting and where it came from.", f"[{command}]"]
    rows = []
    for option in options:
        value, source = chosen[option.name].value, chosen[option.name].source
        if value is None:
            rows.append((option, f"# {option.name} =", f"{source}: {option.unset or 'not set'}"))
        else:
            rows.append((option, f"{option.name} = {toml_text(value, escape=escape)}", source))
    wide = min(max(len(text) for _, text, _ in rows), 44)
    panel = ""
    for option, text, source in rows:
        if option.panel != panel:
            panel = option.panel
            lines += ["", f"# {panel}"]
        lines.append(f"{text:<{wide}}  # {comment_text(source, escape=escape)}")
    return "\n".join(lines)


def toml_text(value: Any, *, escape: bool = False) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(toml_text(inner, escape=escape) for inner in value) + "]"
    if isinstance(value, str):
        quoted = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return escaped(quoted) if escape else quoted
    return repr(value) if isinstance(value, int | float) else str(value)


def comment_text(words: str, *, escape: bool) -> str:
    """Words fit for a comment: one line, and nothing that cannot be written."""
    words = " ".join(words.split())
    return escaped(words) if escape else words


def escaped(text: str) -> str:
    """Characters beyond ASCII as TOML's \\uXXXX and \\UXXXXXXXX."""
    return "".join(c if c.isascii() else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}" for c in text)


def file_from(flag: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The configuration file asked for, by flag or by CRITIC_TRAIN_CONFIG."""
    return flag or environment.get("CRITIC_TRAIN_CONFIG") or None
