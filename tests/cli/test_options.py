"""Options out of a dataclass, and values out of four places."""

from dataclasses import dataclass
from typing import Literal

import pytest
import typer

from critic_train.errors import ConfigError
from critic_train.settings import EvalSettings, FitSettings, Section, Settings, setting
from critic_train_cli.command import Command, add_command
from critic_train_cli.help_page import command_page
from critic_train_cli.options import Chosen, misspelt_variables, options_of, resolve


@dataclass(frozen=True, kw_only=True)
class SomeSection(Section):
    paths: list[str] = setting([], "Where.", panel="Data", metavar="PATH")
    rate: float | None = setting(None, "How fast. [default: 1e-5, or so]", panel="Training")
    size: int = setting(64, "How many.", panel="Training")
    mode: Literal["slow", "fast"] = setting("slow", "Which.", panel="Training")
    no_clip: bool = setting(False, "Off.", panel="Training")
    where: str = setting("auto", "Device.", panel="Training", flag="--on")


@dataclass(frozen=True, init=False)
class SomeSettings(Settings):
    some: SomeSection


OPTIONS = options_of(SomeSettings)
BY_NAME = {option.name: option for option in OPTIONS}


def test_option_knows_what_the_field_says():
    paths, rate, size, mode, no_clip, where = OPTIONS
    assert (paths.flag, paths.kind, paths.repeatable, paths.default, paths.metavar) == (
        "--paths",
        str,
        True,
        [],
        "PATH",
    )
    assert (rate.kind, rate.repeatable, rate.default) == (float, False, None)
    assert (rate.help, rate.unset) == ("How fast.", "1e-5, or so")
    assert (size.kind, size.default, size.metavar, size.variable) == (int, 64, "N", "CRITIC_TRAIN_SIZE")
    assert (mode.kind, mode.choices, mode.metavar) == (str, ("slow", "fast"), "slow|fast")
    assert (no_clip.kind, no_clip.flag, no_clip.metavar) == (bool, "--no-clip", "")
    assert (where.flag, where.panel) == ("--on", "Training")


@pytest.mark.parametrize("settings", [FitSettings, EvalSettings])
def test_defaults_of_the_options_are_those_of_the_settings(settings):
    chosen = resolve(options_of(settings), {}, {}, {})
    values = {name: value.value for name, value in chosen.items()} | {"data": ["x"]}
    assert settings(**values) == settings(data=["x"])
    assert {value.source for value in chosen.values()} == {"default"}


def value_of(name, flags=None, environment=None, file=None):
    return resolve(OPTIONS, flags or {}, environment or {}, file or {})[name]


def test_flag_over_environment_over_file_over_default():
    flags, environment = {"size": "1"}, {"CRITIC_TRAIN_SIZE": "2"}
    file = {"size": Chosen(3, "file a.toml")}
    assert value_of("size", flags, environment, file) == Chosen(1, "flag --size")
    assert value_of("size", {}, environment, file) == Chosen(2, "environment CRITIC_TRAIN_SIZE")
    assert value_of("size", {}, {}, file) == Chosen(3, "file a.toml")
    assert value_of("size") == Chosen(64, "default")


def test_a_flag_not_given_is_no_value():
    """Typer hands over None, an empty list or False for what was not on the command line."""
    flags = {"size": None, "paths": [], "no_clip": False}
    assert {value_of(name, flags).source for name in flags} == {"default"}


def test_an_empty_variable_is_not_set():
    assert value_of("size", environment={"CRITIC_TRAIN_SIZE": ""}).source == "default"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rate", "1e-4", 1e-4),
        ("rate", "3", 3.0),
        ("size", "0", 0),
        ("mode", "fast", "fast"),
        ("no_clip", "1", True),
        ("no_clip", "Yes", True),
        ("no_clip", "0", False),
        ("no_clip", "off", False),
        ("paths", "a b", ["a", "b"]),
        ("paths", "'my rollouts' b*", ["my rollouts", "b*"]),
    ],
)
def test_text_of_a_variable_is_read_as_the_setting(name, text, value):
    read = value_of(name, environment={f"CRITIC_TRAIN_{name.upper()}": text})
    assert read == Chosen(value, f"environment CRITIC_TRAIN_{name.upper()}")


def test_a_repeated_flag_is_a_list_and_its_values_are_not_split():
    assert value_of("paths", {"paths": ["a b", "c"]}).value == ["a b", "c"]


def test_every_unreadable_text_is_named_at_once_with_its_place():
    environment = {"CRITIC_TRAIN_RATE": "quick", "CRITIC_TRAIN_NO_CLIP": "perhaps", "CRITIC_TRAIN_PATHS": "'a"}
    with pytest.raises(ConfigError) as raised:
        resolve(OPTIONS, {"size": "1.5", "mode": "fsat"}, environment, {})
    assert raised.value.message.splitlines() == [
        'environment CRITIC_TRAIN_PATHS cannot be split into words (no closing quotation): "\'a"',
        "environment CRITIC_TRAIN_RATE must be a number, not 'quick'",
        "--size must be a whole number, not '1.5'",
        "--mode must be one of slow, fast, not 'fsat'; did you mean fast?",
        "environment CRITIC_TRAIN_NO_CLIP must be true or false, not 'perhaps'",
    ]


def test_variables_that_are_no_setting_are_told():
    environment = {"CRITIC_TRAIN_SIZ": "1", "CRITIC_TRAIN_SIZE": "1", "CRITIC_TRAIN_HOUSE": "1", "SIZ": "1"}
    assert misspelt_variables(environment, ["CRITIC_TRAIN_SIZE"]) == [
        "CRITIC_TRAIN_HOUSE in the environment is no setting, and changes nothing",
        "CRITIC_TRAIN_SIZ in the environment is no setting; did you mean CRITIC_TRAIN_SIZE?",
    ]


def test_four_sources_through_the_program(program, tmp_path):
    (tmp_path / "a.toml").write_text('lr = 3e-4\nbatch_size = 8\nepochs = 5\ndata = "from_file"\n')
    shown = program("fit", "--config", "a.toml", "--epochs", "7", "--print-config", CRITIC_TRAIN_BATCH_SIZE="16")
    assert shown.returncode == 0
    told = [line.split("  # ") for line in shown.stdout.splitlines() if " = " in line]
    sources = {text.split(" = ")[0]: (text.split(" = ")[1].strip(), source) for text, source in told}
    assert sources["epochs"] == ("7", "flag --epochs")
    assert sources["batch_size"] == ("16", "environment CRITIC_TRAIN_BATCH_SIZE")
    assert sources["lr"] == ("0.0003", "file a.toml")
    assert sources["data"] == ('["from_file"]', "file a.toml")
    assert sources["keep"] == ("2", "default")


def test_misspelt_variable_is_warned_of(program):
    shown = program("fit", "--data", "x", "-q", CRITIC_TRAIN_EPOCH="3")
    assert shown.stderr.startswith("warning: CRITIC_TRAIN_EPOCH in the environment is no setting")
    assert shown.returncode == 0


@dataclass(frozen=True, kw_only=True)
class ArgumentsSection(Section):
    runs: list[str] = setting([], "Which runs.", panel="Data", metavar="RUN", positional=True)
    to: str | None = setting(None, "Where.", panel="Data", metavar="FILE")


@dataclass(frozen=True, init=False)
class TakingArguments(Settings):
    page: ArgumentsSection


def called(*words: str) -> dict[str, object]:
    """What a command with arguments is given by the command line."""
    given: dict[str, object] = {}

    def work(settings: TakingArguments, _: object) -> int:
        given.update(runs=settings.page.runs, to=settings.page.to)
        return 0

    command = Command(name="look", settings=TakingArguments, about="Look.", examples=(), work=work)
    app = typer.Typer()
    app.callback()(lambda: None)
    add_command(app, command, (command,))
    app(args=["look", *words], standalone_mode=False)
    return given


def test_a_positional_setting_takes_every_word_that_is_no_flag():
    assert called("a", "b", "--to", "c") == {"runs": ["a", "b"], "to": "c"}
    assert called("--to", "c", "a") == {"runs": ["a"], "to": "c"}
    assert called() == {"runs": [], "to": None}


def test_a_positional_setting_is_shown_by_what_it_takes():
    page = command_page("critic-train look", "Look.", options_of(TakingArguments), [])
    assert page.splitlines()[0] == "Usage: critic-train look RUN... [OPTIONS]"
    assert "  RUN  " in page
    assert "--runs" not in page
