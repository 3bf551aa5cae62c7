"""Rules of `export` and `show`."""

import pytest

from critic_train.errors import ConfigError
from critic_train.settings import ExportSettings, ShowSettings


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"paths": ["a"]}, "MODEL DIR: two paths are needed, not 1"),
        ({"to": None}, "--to is needed"),
        ({"to": "torch"}, "must be one of transformers, verl, openrlhf, trl, nemo-rl, slime, vllm"),
        ({"bias": "refit"}, "--bias refit needs --data"),
    ],
)
def test_rules_of_export(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        ExportSettings(**({"paths": ["a", "b"], "to": "verl"} | settings))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "--data or --text is needed"),
        ({"data": ["x"], "text": ["y"]}, "--data or --text is needed, one of them"),
        ({"text": ["y"]}, "MODEL is needed with --text"),
        ({"model": ["a", "b"], "data": ["x"]}, "one critic at a time"),
        ({"model": ["a"], "data": ["x"], "prompt": "z"}, "--prompt goes with --text"),
        ({"model": ["a"], "text": ["y"], "uid": ["1"]}, "give one of them"),
        ({"data": ["x"], "show": 0}, "--show must be at least 1"),
    ],
)
def test_rules_of_show(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        ShowSettings(**settings)
