"""How a run was made, and the command that makes it again."""

import shlex

import pytest
import typer.main

from critic_train.report.provenance import command_line, different_settings, provenance_of
from critic_train.report.report_sources import read_sources
from critic_train.settings import EvalSettings, FitSettings, as_dict
from critic_train_cli.main import app
from critic_train_cli.options import options_of, resolve

SETTINGS = [
    FitSettings(data=["a b/", "c'd"], lr=3e-05, no_clip=True, max_steps=10, val_data=["v"], column=["returns=x y"]),
    FitSettings(data=["x"]),
    EvalSettings(data=["x"], model=["runs/a", "$HOME/b"], by=["task"], cliprange_value=0.25, report="p.html"),
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


def test_a_run_tells_what_was_chosen(make_run):
    [source] = read_sources([str(make_run("a", steps=1, lr=0.5))])
    told = provenance_of(source)
    assert ("lr", "0.5") in told.chosen
    assert ("batch size", "64") in told.defaults
    assert ("rollouts", f"{'ab12' * 16} (1 file)") in told.data
    assert {name for name, _ in told.versions} >= {"critic-train", "torch", "python"}


def test_only_what_differs_is_compared(make_run):
    runs = [make_run("a", steps=1, lr=0.5), make_run("b", steps=1, seed=3)]
    rows = different_settings(read_sources([str(run) for run in runs]))
    assert rows == [["seed", "0", "3"], ["lr", "0.5", "not set"]] or sorted(rows) == [
        ["lr", "0.5", "not set"],
        ["seed", "0", "3"],
    ]
    assert different_settings(read_sources([str(runs[0])])) == []


def test_settings_of_another_release_are_shown(make_run):
    """A run may be older or newer than the program that reports it."""
    import json

    run = make_run("a", steps=1)
    record = json.loads((run / "run.json").read_text())
    record["settings"] |= {"flux": 7}
    del record["settings"]["seed"]
    (run / "run.json").write_text(json.dumps(record))
    told = provenance_of(read_sources([str(run)])[0])
    assert ("flux", "7") in told.chosen
    assert "--data rollouts" in told.command
