"""A sample of whole prompt groups that no order can change."""

import numpy as np
import pytest
from support import readable_rollouts

from critic_train.check.survey import GroupSample
from critic_train.rollouts import Rollouts, concat_rollouts


def batches_of(rollouts: Rollouts, size: int, order: np.ndarray | None = None) -> list[Rollouts]:
    order = np.arange(len(rollouts)) if order is None else order
    return [rollouts.take(order[start : start + size]) for start in range(0, len(order), size)]


def sampled(batches: list[Rollouts], most_tokens: int) -> tuple[Rollouts, bool]:
    sample = GroupSample(most_tokens)
    for batch in batches:
        sample.add(batch)
    found = sample.rollouts()
    assert found is not None
    return found, sample.is_everything


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return concat_rollouts([readable_rollouts(40, seed=seed) for seed in range(5)])


def test_a_data_set_that_fits_is_kept_whole(rollouts):
    found, everything = sampled(batches_of(rollouts, 7), 10**9)
    assert everything
    assert sorted(found.row.tolist()) == sorted(rollouts.row.tolist())


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_whole_groups_are_kept_whatever_the_order(rollouts, size):
    most = len(rollouts.input_ids) // 4
    first, everything = sampled(batches_of(rollouts, 50), most)
    assert not everything
    assert 0.1 * most < len(first.input_ids) <= most
    shuffled = np.random.default_rng(size).permutation(len(rollouts))
    second, _ = sampled(batches_of(rollouts, size, shuffled), most)
    assert sorted(set(first.group.tolist())) == sorted(set(second.group.tolist()))
    for group in set(first.group.tolist()):
        assert (second.group == group).sum() == (rollouts.group == group).sum()
    assert np.count_nonzero(np.diff(second.group)) == len(set(second.group.tolist())) - 1, "groups stand together"


def test_one_group_stays_however_large(rollouts):
    found, everything = sampled(batches_of(rollouts, 50), 1)
    assert not everything
    assert len(set(found.group.tolist())) == 1


def test_nothing_gives_nothing():
    assert GroupSample().rollouts() is None
