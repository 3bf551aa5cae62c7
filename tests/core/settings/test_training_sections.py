"""What the sections on training, memory and the run refuse."""

import pytest

from critic_train.errors import ConfigError
from critic_train.settings import FitSettings


def test_patience_needs_held_out_rollouts():
    with pytest.raises(ConfigError, match="--patience needs held-out rollouts"):
        FitSettings(data=["x"], val_fraction=0.0, patience=2)
