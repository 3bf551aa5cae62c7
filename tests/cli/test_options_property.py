"""Whatever is given for settings, from wherever: a value of its kind, or a ConfigError that says what is wrong."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from critic_train.errors import ConfigError
from critic_train.settings import EvalSettings, FitSettings, Settings, as_dict
from critic_train_cli.config_file import config_text, read_config
from critic_train_cli.options import options_of, resolve

COMMANDS: dict[str, type[Settings]] = {"fit": FitSettings, "eval": EvalSettings}
OPTIONS = {name: options_of(kind) for name, kind in COMMANDS.items()}
TEXTS = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "true", "no", "1e999", "-1", "0", "nan", "9" * 400, "forest", "fp32", "column", "'", "a b", "\0"]
    ),
)
VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(),
        st.just(10**400),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8).filter(str.isprintable),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)


def is_of_its_kind(option: Any, value: Any) -> bool:
    if value is None:
        return option.default is None
    if option.repeatable:
        return isinstance(value, list) and all(isinstance(one, option.kind) for one in value)
    if option.kind is int:
        return type(value) is int and abs(value) < 2**64
    return isinstance(value, option.kind) and (not option.choices or value in option.choices)


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=150)
@given(data=st.data())
def test_any_text_from_flags_and_environment(command: str, data: st.DataObject) -> None:
    options = OPTIONS[command]
    some = st.sampled_from(options)
    flags: dict[str, Any] = {}
    for option in data.draw(st.lists(some, max_size=4, unique_by=lambda option: option.name)):
        plain = option.kind is bool
        flags[option.name] = True if plain else data.draw(st.lists(TEXTS, max_size=2) if option.repeatable else TEXTS)
    environment = {option.variable: data.draw(TEXTS) for option in data.draw(st.lists(some, max_size=4))}
    try:
        chosen = resolve(options, flags, environment, {})
        assert all(is_of_its_kind(option, chosen[option.name].value) for option in options)
        made = COMMANDS[command](**{name: one.value for name, one in chosen.items()})
    except ConfigError:
        return
    numbers = [value for value in as_dict(made).values() if isinstance(value, float)]
    assert not any(math.isnan(number) for number in numbers)


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_from_a_file(command: str, data: st.DataObject, tmp_path: Path) -> None:
    names = st.sampled_from([option.name for option in OPTIONS[command]] + ["nonsense", "eval", "fit"])
    lines = [f"{name} = {toml(data.draw(VALUES))}" for name in data.draw(st.sets(names, max_size=4))]
    path = tmp_path / "some.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        found = read_config(str(path), command, OPTIONS)
    except ConfigError:
        return
    by_name = {option.name: option for option in OPTIONS[command]}
    assert all(is_of_its_kind(by_name[name], chosen.value) for name, chosen in found.items())


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.mark.parametrize("escape", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_printed_is_read_back(command: str, escape: bool, data: st.DataObject, tmp_path: Path) -> None:
    options = OPTIONS[command]
    kinds: dict[type, st.SearchStrategy[str]] = {
        int: st.integers(-(2**63), 2**63).map(str),
        float: st.floats(allow_nan=False, allow_infinity=False).map(repr),
        str: st.text(min_size=1, max_size=8).filter(lambda text: "\0" not in text and text.isprintable()),
    }
    flags: dict[str, Any] = {}
    for option in data.draw(st.lists(st.sampled_from(options), max_size=6, unique_by=lambda option: option.name)):
        text = st.sampled_from(option.choices) if option.choices else kinds.get(option.kind)
        if text is not None:
            flags[option.name] = data.draw(st.lists(text, min_size=1, max_size=2) if option.repeatable else text)
    chosen = resolve(options, flags, {}, {})
    path = tmp_path / "printed.toml"
    path.write_text(config_text(command, options, chosen, escape=escape), encoding="utf-8")
    if escape:
        assert path.read_text().isascii()
    tomllib.loads(path.read_text(encoding="utf-8"))
    again = read_config(str(path), command, OPTIONS)
    assert {name: one.value for name, one in again.items()} == {
        name: one.value for name, one in chosen.items() if one.value is not None
    }


@pytest.mark.parametrize(
    "content",
    [b"a = " + b"[" * 100_000, b"a = " + b"9" * 10_000, b"\xff", b" " * (2**20 + 1), b"a = {" * 5000, b"x = 1e400\n="],
    ids=range(6),
)
def test_files_that_are_no_configuration(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "some.toml").write_bytes(content)
    with pytest.raises(ConfigError):
        read_config(str(tmp_path / "some.toml"), "fit", OPTIONS)
