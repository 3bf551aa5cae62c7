"""How a run was made, and the command that makes it again."""

import json
from pathlib import Path

from critic_train.report.page import render
from critic_train.report.provenance import different_settings, provenance_of, show_command
from critic_train.report.report_sources import read_sources


def test_a_run_tells_what_was_given(make_run):
    [source] = read_sources([str(make_run("a", steps=1, lr=0.5))])
    told = provenance_of(source)
    assert ("lr", "0.5") in told.given
    assert ("batch size", "64") in told.defaults
    assert ("rollouts", f"{'ab12' * 16} (1 file)") in told.data
    assert {name for name, _ in told.versions} >= {"critic-train", "torch", "python"}


def with_choices(run: Path, *, steps: int = 9) -> Path:
    """The run as if it had chosen these."""
    record = json.loads((run / "run.json").read_text())
    record["recipe"] = {"lr": {"value": 0.00064, "reason": "for narrow states"}}
    record["recipe"]["patience"] = {"value": 3, "reason": "as many as get no further"}
    record["chosen"] = {"precision": "fp32", "max_tokens": 4096, "offload": "none"}
    record["resolved"]["steps"] = steps
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_a_run_tells_what_it_chose_and_why(make_run):
    run = with_choices(make_run("a", steps=1, max_tokens=4096))
    told = provenance_of(read_sources([str(run)])[0])
    assert told.chosen == [
        ("lr", "0.00064: for narrow states"),
        ("patience", "3: as many as get no further"),
        ("precision", "fp32"),
        ("offload", "none"),
    ]
    assert ("max tokens", "4,096") in told.given
    assert not {"lr", "patience", "offload"} & {name for name, _ in told.defaults}
    assert "0.00064: for narrow states" in render(read_sources([str(run)]))


def test_the_learning_rate_of_a_run_without_a_step_is_nothing_to_tell(make_run):
    run = with_choices(make_run("a", steps=1), steps=0)
    assert "lr" not in {name for name, _ in provenance_of(read_sources([str(run)])[0]).chosen}


def test_what_one_run_chose_is_compared_with_what_another_was_given(make_run):
    runs = [make_run("a", steps=1, lr=0.5, patience=3), with_choices(make_run("b", steps=1))]
    rows = {name: cells for name, *cells in different_settings(read_sources([str(run) for run in runs]))}
    assert rows["lr"] == ["0.5", "0.00064"]
    assert "patience" not in rows


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
    run = make_run("a", steps=1)
    record = json.loads((run / "run.json").read_text())
    record["settings"] |= {"flux": 7}
    del record["settings"]["seed"]
    (run / "run.json").write_text(json.dumps(record))
    told = provenance_of(read_sources([str(run)])[0])
    assert ("flux", "7") in told.given
    assert "--data rollouts" in told.command


def test_the_command_that_shows_a_prompt_group(make_run):
    """Of a run: its held-out rollouts, read as it read them, without what only training needs."""
    run = make_run("a b", steps=1, column=["uid=prompt"], returns="mc", val_data=["held out/"], max_length=99)
    [source] = read_sources([str(run)])
    command = show_command(source, "critic", "it's 3")
    assert command.startswith("critic-train show ")
    for part in ("--uid 'it'\"'\"'s 3'", "--data 'held out/'", "--column uid=prompt", "--returns mc", f"'{run}'"):
        assert part in command
    assert "--max-length" not in command
