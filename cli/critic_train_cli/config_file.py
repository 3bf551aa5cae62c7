"""Settings in a TOML file: reading them for --config, and writing them for --print-config."""

import json
import os
from collections.abc import Mapping
from typing import Any

from critic_train.errors import ConfigError
from critic_train_cli.options import LARGEST, Chosen, Option, did_you_mean

CANNOT_READ = "a configuration file is TOML; --print-config writes one"
MAX_BYTES = 2**20


def read_config(path: str, command: str, options: Mapping[str, list[Option]]) -> dict[str, Chosen]:
    """Read one command's settings from a file.

    Keys are field names with `-` or `_`, at the top of the file or in the command's table, which takes precedence.

    Args:
        path: the file.
        command: the command whose settings are wanted; its table is `[fit]` for fit.
        options: the options of every command: the file may have tables of other commands, which are checked too.

    Raises:
        ConfigError: the file cannot be read, keys are unknown, or values have the wrong type; all are named.
    """
    tables = load_toml(path)
    errors: list[str] = []
    own = tables.pop(command, {})
    for other in [name for name in tables if name in options and isinstance(tables[name], dict)]:
        _, more = read_table(tables.pop(other), options[other], f"{path}: [{other}] ")
        errors += more
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: {command} must be a table, written [{command}]")
    top_values, more = read_table(tables, options[command], f"{path}: ", {"others": options, "command": command})
    errors += more
    own_values, more = read_table(own, options[command], f"{path}: [{command}] ")
    errors += more
    if errors:
        hint = f"critic-train {command} --print-config shows every key"
        raise ConfigError("\n".join(errors), hint=hint)
    return {name: Chosen(value, f"file {path}") for name, value in (top_values | own_values).items()}


def load_toml(path: str) -> dict[str, Any]:
    """Parse the file.

    Raises:
        ConfigError: it is missing, too large or no TOML.
    """
    import tomllib

    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES:,} bytes: it is no configuration", hint=CANNOT_READ)
        return tomllib.loads(content.decode())
    except FileNotFoundError:
        raise ConfigError(f"--config: no file {path}", hint=CANNOT_READ) from None
    except IsADirectoryError:
        raise ConfigError(f"--config: {path} is a folder", hint=CANNOT_READ) from None
    except RecursionError:
        raise ConfigError(f"{path} is no valid TOML: it is nested too deeply", hint=CANNOT_READ) from None
    except ValueError as error:  # from TOML, from UTF-8, or from an integer with thousands of digits
        raise ConfigError(f"{path} is no valid TOML: {error}", hint=CANNOT_READ) from None


def read_table(
    table: Mapping[str, Any], options: list[Option], prefix: str, context: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Read one table.

    Args:
        table: as TOML was parsed.
        options: of the command that the table is for.
        prefix: the beginning of error messages: file and table.
        context: for the top of the file: "command", the command whose settings are wanted, and "others", the options
            of every command, where an unknown key may belong.

    Returns:
        (field name -> value, error messages).
    """
    by_name = {option.name: option for option in options}
    values: dict[str, Any] = {}
    errors: list[str] = []
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in by_name:
            errors.append(f"{prefix}{unknown_key(key, list(by_name), context)}")
        elif name in values:
            errors.append(f"{prefix}{name} is given twice, once with - and once with _")
        elif not is_of_kind(by_name[name], value):
            errors.append(f"{prefix}{key} must be {expected_of(by_name[name])}, not {toml_text(value)}")
        else:
            values[name] = as_setting(by_name[name], value)
    return values, errors


def unknown_key(key: str, candidates: list[str], context: Mapping[str, Any] | None) -> str:
    """The error message for a key that is no setting here, with what was probably meant."""
    name = key.replace("-", "_")
    if context:
        others = [c for c, options in context["others"].items() if name in {o.name for o in options}]
        if others:
            return f"{key} is a setting of {others[0]}, not of {context['command']}; put it under [{others[0]}]"
        candidates = [*candidates, *context["others"]]
    return f"unknown key {key}{did_you_mean(name, candidates)}"


def expected_of(option: Option) -> str:
    """What the value of a key must be, for an error message."""
    return f"{option.expected} or a list of such" if option.repeatable else option.expected


def is_of_kind(option: Option, value: Any) -> bool:
    """Whether a TOML value has the setting's type; an integer also counts as a float."""
    if option.repeatable and isinstance(value, list):
        return all(is_one_of_kind(option, inner) for inner in value)
    return is_one_of_kind(option, value)


def is_one_of_kind(option: Option, value: Any) -> bool:
    """The same for one value. A bool is no number, although Python has it so."""
    if option.choices:
        return isinstance(value, str) and value in option.choices
    if isinstance(value, bool) or option.kind is bool:
        return isinstance(value, bool) and option.kind is bool
    if isinstance(value, int) and not -LARGEST < value < LARGEST:
        return False
    return isinstance(value, int | float if option.kind is float else option.kind)


def as_setting(option: Option, value: Any) -> Any:
    """The value in the setting's type: one value becomes a list where lists are wanted, 1 becomes 1.0 for a float."""
    if option.repeatable:
        return value if isinstance(value, list) else [value]
    return float(value) if option.kind is float else value


def config_text(command: str, options: list[Option], chosen: Mapping[str, Chosen], *, escape: bool = False) -> str:
    """Every setting with its origin as a comment, as TOML that `--config` reads.

    Args:
        command: the name of the table.
        options: the command's options.
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
    width = min(max(len(text) for _, text, _ in rows), 44)
    panel = ""
    for option, text, source in rows:
        if option.panel != panel:
            panel = option.panel
            lines += ["", f"# {panel}"]
        lines.append(f"{text:<{width}}  # {comment_text(source, escape=escape)}")
    return "\n".join(lines)


def toml_text(value: Any, *, escape: bool = False) -> str:
    """A value in TOML's syntax."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(toml_text(inner, escape=escape) for inner in value) + "]"
    if isinstance(value, str):
        quoted = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return escaped(quoted) if escape else quoted
    return repr(value) if isinstance(value, int | float) else str(value)


def comment_text(text: str, *, escape: bool) -> str:
    """The text of a comment: on one line, escaped where the stream needs it."""
    text = " ".join(text.split())
    return escaped(text) if escape else text


def escaped(text: str) -> str:
    """The text with characters beyond ASCII written as TOML's \\uXXXX and \\UXXXXXXXX."""
    return "".join(c if c.isascii() else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}" for c in text)


def config_path(flag: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The configuration file, from --config or CRITIC_TRAIN_CONFIG, or None."""
    return flag or environment.get("CRITIC_TRAIN_CONFIG") or None
