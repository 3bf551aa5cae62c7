"""What may differ when a run is resumed, and what is refused by name (scenarios 12, 13 and 31)."""

from pathlib import Path

import pytest

from critic_train.errors import ConfigError
from critic_train.run.changes import changed_files, chosen_settings, refuse_changes
from critic_train.run.manifest import tokenizer_digest
from critic_train.settings import FitSettings, as_dict

OUT = Path("runs/a")


def record(**settings: object) -> dict:
    chosen = {"data": ["rollouts"], "max_steps": 10, "lr_schedule": "constant", "warmup_steps": 2, "eval_every": 5}
    return {
        "settings": as_dict(FitSettings(**(chosen | settings))),
        "data": data("a", "b"),
        "val_data": None,
        "model": {"files": {"config.json": 1}},
        "tokenizer": {"tokenizer.json": "f00"},
        "versions": {"torch": "2.11"},
        "threads": 1,
        "ranks": 1,
    }


def data(*names: str, **rows: int) -> dict:
    files = [{"name": name, "rows": rows.get(name, 1)} for name in names]
    return {"files": files, "digest": str(files)}


def test_every_changed_setting_is_named():
    with pytest.raises(ConfigError) as told:
        refuse_changes(record(), record(lr=1e-4, batch_size=8, log_every=3, keep=7, checkpoint_every=9), OUT)
    assert told.value.message == (
        "runs/a holds a run that was started differently:\n"
        "  --batch-size was 64, is now 8\n"
        "  --lr was not set, is now 0.0001"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": data("a", "b", "c")}, "the rollouts changed since the run began: added c"),
        ({"data": data("a")}, "the rollouts changed since the run began: removed b"),
        ({"data": data("a", "b", b=2)}, "the rollouts changed since the run began: changed b"),
        ({"data": data("b", "a")}, "the rollouts changed since the run began: their order is another"),
        ({"val_data": data("v")}, "the held-out rollouts changed since the run began: added v"),
        ({"model": {"files": {}}}, "the base model changed since the run began"),
        ({"tokenizer": {"tokenizer.json": "bad"}}, "the base model's tokenizer changed since the run began"),
    ],
)
def test_changed_rollouts_models_and_tokenizers_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        refuse_changes(record(), record() | change, OUT)


def test_a_model_where_there_was_none_is_told_as_that():
    """Not as one that changed: its tokenizer would be said to have changed as well."""
    none = {"model": None, "tokenizer": None}
    for was, now, said in (
        (none, {}, "it began from scratch, not from --model"),
        ({}, none, "it began from a --model"),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse_changes(record() | was, record() | now, OUT)
        assert said in caught.value.message
        assert "changed" not in caught.value.message


def test_a_run_of_before_tokenizers_were_recorded_goes_on():
    before = record()
    del before["tokenizer"]
    assert refuse_changes(before, record(), OUT) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [({"versions": {"torch": "3"}}, "library versions"), ({"threads": 2}, "number of threads")],
)
def test_other_versions_and_threads_are_warned_of(change, what):
    """Scenario 31."""
    said = f"the {what} changed since the run began: the result may differ by rounding"
    assert refuse_changes(record(), record() | change, OUT) == [said]


def test_what_chose_itself_is_compared_as_it_chose():
    said = "--max-tokens was 4096, is now 100: the result may differ from the undisturbed run's by rounding"
    for before in (record(max_tokens=4096), record() | {"chosen": {"max_tokens": 4096}}):
        assert refuse_changes(before, record(max_tokens=100), OUT) == [said]
        assert refuse_changes(before, record(max_tokens=4096), OUT) == []
    # A run that was begun when these settings had a value goes on under a command that leaves them to themselves.
    begun = record(max_tokens=4096, precision="fp32", activation_checkpointing="none", offload="none")
    assert refuse_changes(begun, record(), OUT) == []
    assert chosen_settings(begun) == {
        "max_tokens": 4096,
        "precision": "fp32",
        "activation_checkpointing": "none",
        "offload": "none",
    }
    with pytest.raises(ConfigError, match="--precision was fp32, is now bf16"):
        refuse_changes(begun, record(precision="bf16"), OUT)
    with pytest.raises(ConfigError, match="--precision was bf16, is now fp32"):
        refuse_changes(record() | {"chosen": {"precision": "bf16"}}, record(precision="fp32"), OUT)


def test_a_run_may_be_made_longer_where_nothing_depends_on_its_length():
    said = "--max-steps was 10, is now 20: the run goes on beyond where it was to end"
    assert refuse_changes(record(), record(max_steps=20), OUT) == [said]


@pytest.mark.parametrize(
    ("same", "change"),
    [
        ({"lr_schedule": "cosine"}, {"max_steps": 20}),
        ({"warmup_steps": None}, {"max_steps": 20}),
        ({"eval_every": None}, {"max_steps": 20}),
        ({"old_values": "epoch"}, {"max_steps": 20}),
        ({}, {"max_steps": 9}),
        ({}, {"max_steps": None}),
        ({"epochs": 3}, {"epochs": 2, "max_steps": 20}),
    ],
)
def test_elsewhere_another_length_is_refused(same, change):
    with pytest.raises(ConfigError, match="can be made longer with --lr-schedule constant"):
        refuse_changes(record(**same), record(**(same | change)), OUT)


def test_long_lists_of_files_are_cut():
    many = data(*(f"part-{n}" for n in range(9)))
    assert changed_files(data(), many).endswith("part-4 and 4 more")


def test_the_tokenizer_is_told_by_its_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    before = tokenizer_digest(tmp_path, ("tokenizer.json", "vocab.json"))
    assert list(before) == ["tokenizer.json"]
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert tokenizer_digest(tmp_path, ("tokenizer.json", "vocab.json")) != before
