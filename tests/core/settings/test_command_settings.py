"""Rules of a command's settings, those between its sections included."""

import pytest

from critic_train.errors import ConfigError
from critic_train.settings import FitSettings, PredictSettings


def test_broken_rules_of_all_sections_and_between_them_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        FitSettings(lr=-1.0, keep=0, nproc=0, optimizer="adamw-8bit", offload="all")
    assert raised.value.message.splitlines() == [
        "--data is needed: a folder, a Parquet file or a glob",
        "--lr must be at least 0, not -1.0",
        "--nproc must be at least 1, not 0",
        "--keep must be at least 1, not 0",
        "--optimizer adamw-8bit cannot be combined with --offload all",
    ]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"model": None}, "--model is needed"),
        ({"to": None}, "--to is needed"),
        ({"part": "3/2"}, "--part takes K/N, as in 1/4 to 4/4, not '3/2'"),
        ({"part": "0/2"}, "--part takes K/N"),
        ({"write": ["advantages"]}, "--write advantages needs --returns mc or gae"),
        ({"write": ["returns"]}, "--write returns needs --returns mc or gae"),
        ({"truncated": "drop"}, "--truncated drop needs --returns mc or gae"),
        ({"returns": "mc", "write": ["values"]}, "--returns mc computes nothing"),
        ({"returns": "mc", "whiten_advantages": True}, "--whiten-advantages needs --write advantages"),
    ],
)
def test_predict_refuses_what_does_not_go_together(settings, complaint):
    with pytest.raises(ConfigError) as refused:
        PredictSettings(**({"data": ["x"], "model": "m", "to": "y"} | settings))
    assert refused.value.message.startswith(complaint)


def test_8_bit_moments_stay_where_they_are():
    with pytest.raises(ConfigError, match="--optimizer adamw-8bit cannot be combined with --offload"):
        FitSettings(data=["x"], optimizer="adamw-8bit", offload="optimizer")
