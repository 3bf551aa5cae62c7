"""Learning rates of a run: as given, or the defaults for what is trained."""

from types import SimpleNamespace
from typing import Any

import pytest

from critic_train.settings import FitSettings
from critic_train.training.build import LR_ADAPTERS, LR_FINE_TUNING, LR_NEW_HEAD, resolve_learning_rates

NEW: Any = None
WITHOUT_HEAD: Any = SimpleNamespace(head=None)
WITH_HEAD: Any = SimpleNamespace(head="score")


@pytest.mark.parametrize(
    ("source", "flags", "expected"),
    [
        (NEW, {"preset": "tiny"}, (2e-3, 2e-3)),
        (NEW, {"preset": "base"}, (3e-4, LR_NEW_HEAD)),
        (WITHOUT_HEAD, {"model": "m"}, (LR_FINE_TUNING, LR_NEW_HEAD)),
        (WITH_HEAD, {"model": "m"}, (LR_FINE_TUNING, LR_FINE_TUNING)),
        (WITH_HEAD, {"model": "m", "train": "lora"}, (LR_ADAPTERS, LR_ADAPTERS)),
        (WITHOUT_HEAD, {"model": "m", "lr": 0.5}, (0.5, 0.5)),
        (WITH_HEAD, {"model": "m", "head_lr": 0.0}, (LR_FINE_TUNING, 0.0)),
    ],
)
def test_learning_rates_are_those_given_or_those_of_what_is_trained(source, flags, expected):
    settings = FitSettings(data=["x"], **flags)
    assert resolve_learning_rates(settings.model, settings.optimizer, source) == expected
