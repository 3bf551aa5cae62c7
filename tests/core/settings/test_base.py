"""Settings composed of sections: given, recorded and changed by the names of their fields alone."""

import pickle
from collections import Counter

import pytest

from critic_train.errors import ConfigError
from critic_train.settings import (
    CheckSettings,
    ConvertSettings,
    EvalSettings,
    FitSettings,
    PredictSettings,
    ReportSettings,
    Settings,
    SplitSettings,
    VerifySettings,
    as_dict,
    defaults_of,
    settings_fields,
)

COMMANDS: tuple[type[Settings], ...] = (
    FitSettings,
    EvalSettings,
    PredictSettings,
    SplitSettings,
    CheckSettings,
    ConvertSettings,
    VerifySettings,
    ReportSettings,
)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_two_sections_of_a_command_have_a_field_of_the_same_name(command: type[Settings]) -> None:
    names = Counter(field.name for field in settings_fields(command))
    assert names.most_common(1)[0][1] == 1
    assert list(names) == list(defaults_of(command))


def test_values_are_given_by_name_and_read_by_section() -> None:
    settings = FitSettings(data=["x"], lr=1e-4, optimizer="adamw-8bit", model="some", out="runs/a")
    assert (settings.reading.data, settings.optimizer.lr, settings.run.out) == (["x"], 1e-4, "runs/a")
    assert (settings.optimizer.optimizer, settings.model.model) == ("adamw-8bit", "some")
    assert as_dict(settings) == defaults_of(FitSettings) | {
        "data": ["x"],
        "lr": 1e-4,
        "optimizer": "adamw-8bit",
        "model": "some",
        "out": "runs/a",
    }


def test_a_copy_has_the_changes_and_is_validated() -> None:
    settings = FitSettings(data=["x"], lr=1e-4)
    assert settings.replace(lr=1e-3) == FitSettings(data=["x"], lr=1e-3)
    assert settings.optimizer.lr == 1e-4
    with pytest.raises(ConfigError, match="--batch-size must be at least 1"):
        settings.replace(batch_size=0)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(TypeError, match="EvalSettings has no setting compile, learning_rate"):
        EvalSettings(data=["x"], compile=True, seed=1, learning_rate=1e-3)
    with pytest.raises(TypeError, match="FitSettings has no setting reading"):
        FitSettings(data=["x"]).replace(reading=None)


def test_settings_are_frozen_and_can_be_sent_to_another_process() -> None:
    settings = FitSettings(data=["x"], log_to=["wandb"])
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(AttributeError):
        settings.run = None  # type: ignore[assignment, misc]
    with pytest.raises(AttributeError):
        settings.optimizer.lr = 1.0  # type: ignore[misc]


def test_values_of_another_type_are_refused_all_at_once() -> None:
    """What the command line parses, a Python caller may give as anything."""
    with pytest.raises(ConfigError) as raised:
        FitSettings(data="rollouts/", epochs=True, lr="3", precision="fp16", out=3, no_clip=1, log_to=["mlflow"])
    assert raised.value.message.splitlines() == [
        "--data must be a list, each text, not 'rollouts/'",
        "--no-clip must be true or false, not 1",
        "--epochs must be a whole number, not True",
        "--lr must be a number, not '3'",
        "--precision must be one of auto, fp32, bf16, not 'fp16'",
        "--out must be text, not 3",
        "--log-to must be a list, each one of tensorboard, wandb, trackio, not ['mlflow']",
    ]


def test_an_int_is_a_number_and_none_is_one_where_it_is_the_default() -> None:
    assert FitSettings(data=["x"], lr=1, max_steps=None, warmup_steps=2).optimizer.lr == 1
    with pytest.raises(ConfigError, match="--batch-size must be a whole number, not None"):
        FitSettings(data=["x"], batch_size=None)
