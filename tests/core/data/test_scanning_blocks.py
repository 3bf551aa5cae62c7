"""Blocks hold what the reader gives, in its order, and end where the rollouts say, not where batches do."""

import itertools

import numpy as np
import pytest
from support import branching_rollouts, write_shard

from critic_train.data import decoding
from critic_train.data.reading import RolloutReader
from critic_train.data.scanning import blocks
from critic_train.data.shards import find_shards


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        write_shard(tmp_path / f"{name}.parquet", branching_rollouts(number))
    return tmp_path


def cut(folder, most_tokens):
    return list(blocks(RolloutReader(find_shards([str(folder)])), most_tokens))


@pytest.mark.parametrize("most_tokens", [1, 30, 100, 250, 10**6])
def test_bounds_depend_on_the_rollouts_alone(folder, most_tokens, monkeypatch):
    whole = cut(folder, most_tokens)
    monkeypatch.setattr(decoding, "FIRST_ROWS", 2)
    monkeypatch.setattr(decoding, "MOST_ROWS", 3)
    pieces = cut(folder, most_tokens)
    assert [block.row.tolist() for block in whole] == [block.row.tolist() for block in pieces]
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.group, other.group)
    rows = np.concatenate([block.row for block in whole])
    np.testing.assert_array_equal(rows, np.arange(3 * 21))


@pytest.mark.parametrize("most_tokens", [1, 30, 100, 250])
def test_each_block_is_as_full_as_it_can_be_and_of_one_file(folder, most_tokens):
    found = cut(folder, most_tokens)
    for block, following in itertools.pairwise(found):
        assert len(block) == 1 or block.offsets[-1] <= most_tokens
        same_file = block.row[0] // 21 == following.row[0] // 21
        assert block.row[0] // 21 == block.row[-1] // 21
        assert not same_file or block.offsets[-1] + following.lengths[0] > most_tokens
