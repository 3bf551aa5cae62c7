"""Settings as the command that gives them, and the command that comes after one."""

import shlex

import pytest
import typer.main

from critic_train.settings import EvalSettings, ExportSettings, FitSettings, PredictSettings, as_dict
from critic_train.settings.command_lines import COMPUTE, READING, RETURNS, command_line, next_command
from critic_train_cli.main import app
from critic_train_cli.options import options_of, resolve

SETTINGS = [
    FitSettings(data=["a b/", "c'd"], lr=3e-05, no_clip=True, max_steps=10, val_data=["v"], column=["returns=x y"]),
    FitSettings(data=["x"]),
    EvalSettings(data=["x"], model=["runs/a", "$HOME/b"], by=["task"], cliprange_value=0.25, report="p.html"),
    ExportSettings(paths=["runs/a b", "out"], to="verl"),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_command_gives_the_same_settings(settings):
    """The line is split as a shell does and read as the program reads it."""
    kind = type(settings)
    words = shlex.split(command_line(kind, as_dict(settings)))
    assert words[:2] == ["critic-train", kind.command]
    parsed = typer.main.get_command(app).commands[kind.command].make_context(kind.command, words[2:])  # type: ignore[attr-defined]
    chosen = resolve(options_of(kind), parsed.params, {}, {})
    assert kind(**{name: value.value for name, value in chosen.items()}) == settings


def test_what_is_at_its_default_is_left_unsaid():
    assert command_line(FitSettings, as_dict(FitSettings(data=["x"]))) == "critic-train fit --data x"


def test_the_next_command_reads_the_same_rollouts_in_the_same_way():
    before = FitSettings(data=["a"], returns="mc", gamma=0.9, column=["rewards=r s"], on_bad_rows="skip", lr=1.0)
    assert next_command(EvalSettings, before, READING + RETURNS + COMPUTE, model=["m"], data=["b c"]) == (
        "critic-train eval --data 'b c' --column 'rewards=r s' --on-bad-rows skip --returns mc --gamma 0.9 --model m"
    )


def test_nothing_is_carried_that_was_not_asked_for_or_that_is_taken_back():
    before = PredictSettings(data=["a"], model="m", to="t", returns="gae", lam=0.5, column=["values=v"], device="cpu")
    assert next_command(FitSettings, before, ["column"], data=["t"]) == "critic-train fit --data t --column values=v"
    after = next_command(EvalSettings, before, RETURNS, data=["t"], lam=None)
    assert after == "critic-train eval --data t --returns gae"
