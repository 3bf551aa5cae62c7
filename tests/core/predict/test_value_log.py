"""A log of predicted values: what whole blocks had computed is passed over, parts of blocks are computed again."""

import numpy as np
import pytest

from critic_train.predict.value_log import LoggedValues, ValueLog

BLOCKS = [np.arange(5, dtype=np.float32), np.full(3, 0.5, dtype=np.float32), np.zeros(0, np.float32), np.ones(4)]


def computed(path, stop_after=4):
    """Log the blocks up to one; which of them had to be computed."""
    numbers = []
    with ValueLog(path) as log:
        for number, block in enumerate(BLOCKS[:stop_after]):
            if not log.has(len(block)):
                numbers.append(number)
                log.append(block)
    return numbers


def test_values_come_back_under_the_mask(tmp_path):
    computed(tmp_path / "new" / "log")
    mask = np.array([0, 1, 1, 0, 1, 1, 1, 1], dtype=bool)
    with LoggedValues(tmp_path / "new" / "log") as values:
        assert values.over(mask).tolist() == [0, 0, 1, 0, 2, 3, 4, 0.5]
        assert values.over(np.ones(2, dtype=bool)).tolist() == [0.5, 0.5]
        assert values.over(np.zeros(2, dtype=bool)).tolist() == [0, 0]


@pytest.mark.parametrize("stop_after", range(len(BLOCKS) + 1))
def test_a_stopped_log_is_gone_on_with(stop_after, tmp_path):
    computed(tmp_path / "whole")
    computed(tmp_path / "log", stop_after)
    again = computed(tmp_path / "log")
    assert [n for n in again if len(BLOCKS[n])] == [n for n in range(stop_after, len(BLOCKS)) if len(BLOCKS[n])]
    assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("size", [0, 3, 19, 20, 22, 31, 47, 48])
def test_a_log_cut_anywhere_ends_as_the_whole_one(size, tmp_path):
    """A kill or a full disk leaves any number of its bytes."""
    computed(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "log").write_bytes(content[:size])
    computed(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == content
