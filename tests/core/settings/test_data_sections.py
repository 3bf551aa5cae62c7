"""What the sections on data and returns refuse."""

import pytest

from critic_train.errors import ConfigError
from critic_train.settings import EvalSettings


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"gamma": 0.9}, "--gamma needs --returns mc or gae"),
        ({"lam": 0.9}, "--lam needs --returns mc or gae"),
        ({"lam_policy": "0.9"}, "--lam-policy needs --returns mc or gae"),
        ({"truncated": "bootstrap"}, "--truncated bootstrap needs --returns mc or gae"),
        ({"returns": "mc", "lam": 0.9}, "--lam needs --returns gae"),
        ({"returns": "gae", "gamma": 1.1}, "--gamma must be from 0 to 1, not 1.1"),
        ({"returns": "gae", "lam": float("nan")}, "--lam must be from 0 to 1, not nan"),
        ({"returns": "gae", "lam_policy": "most"}, "--lam-policy must be a number from 0 to 1 or auto, not 'most'"),
        ({"returns": "gae", "lam_policy": "2"}, "--lam-policy must be a number from 0 to 1 or auto, not '2'"),
        ({"returns": "gae", "length_alpha": 0.1}, "--length-alpha belongs to --lam-policy auto"),
        ({"returns": "gae", "length_alpha": 0.0, "lam_policy": "auto"}, "--length-alpha must be above 0, not 0"),
    ],
)
def test_settings_that_say_nothing_or_too_much(settings, complaint):
    with pytest.raises(ConfigError) as refused:
        EvalSettings(data=["x"], **settings)
    assert refused.value.message.startswith(complaint)


def test_settings_that_go_together():
    EvalSettings(data=["x"], truncated="drop")
    EvalSettings(data=["x"], returns="mc", lam_policy="auto", length_alpha=0.4, truncated="bootstrap")
