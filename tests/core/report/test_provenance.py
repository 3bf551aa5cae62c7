"""How a run was made, and the command that makes it again."""

from critic_train.report.provenance import different_settings, provenance_of, show_command
from critic_train.report.report_sources import read_sources


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


def test_the_command_that_shows_a_prompt_group(make_run):
    """Of a run: its held-out rollouts, read as it read them, without what only training needs."""
    run = make_run("a b", steps=1, column=["uid=prompt"], returns="mc", val_data=["held out/"], max_length=99)
    [source] = read_sources([str(run)])
    command = show_command(source, "critic", "it's 3")
    assert command.startswith("critic-train show ")
    for part in ("--uid 'it'\"'\"'s 3'", "--data 'held out/'", "--column uid=prompt", "--returns mc", f"'{run}'"):
        assert part in command
    assert "--max-length" not in command
