"""Who is held out and who comes when depends on seed, epoch and group keys alone."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from critic_train.data.order import connected_groups, epoch_plan, split_groups, steps_of_epoch

GROUPS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9), min_size=1, max_size=60).map(
    lambda keys: np.asarray(keys, dtype=np.int64)
)


@given(GROUPS, st.floats(0, 0.999), st.integers(0, 2**63))
def test_no_prompt_is_on_both_sides_and_none_is_lost(groups: np.ndarray, fraction: float, seed: int) -> None:
    kept, held = split_groups(groups, fraction, seed)
    assert sorted([*kept, *held]) == list(range(len(groups)))
    assert not set(groups[kept]) & set(groups[held])
    assert len(kept)
    assert kept.tolist() == sorted(kept)
    assert held.tolist() == sorted(held)
    several = len(set(groups.tolist())) > 1
    assert bool(len(held)) == (fraction > 0 and several)


def test_the_share_held_out_is_the_one_asked_for() -> None:
    groups = np.repeat(np.arange(1000), 3)
    for fraction in (0.0, 0.001, 0.1, 0.5, 0.9):
        assert len(split_groups(groups, fraction, 7)[1]) == round(1000 * fraction) * 3


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_files() -> None:
    groups = np.random.default_rng(0).integers(-(2**62), 2**62, 500)
    held = {seed: set(groups[split_groups(groups, 0.2, seed)[1]].tolist()) for seed in range(4)}
    assert len({frozenset(keys) for keys in held.values()}) == 4
    backwards = groups[::-1].copy()
    assert set(backwards[split_groups(backwards, 0.2, 3)[1]].tolist()) == held[3]


def test_new_groups_move_only_those_at_the_edge() -> None:
    groups = np.arange(1000)
    before = set(split_groups(groups[:990], 0.1, 5)[1].tolist())
    after = set(split_groups(groups, 0.1, 5)[1].tolist())
    assert len(before ^ after) <= 11


@given(GROUPS, st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_has_every_rollout_once_and_groups_together(
    groups: np.ndarray, batch_size: int, seed: int, epoch: int
) -> None:
    plan = epoch_plan(groups, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(plan.order) == list(range(len(groups)))
    assert plan.bounds[0] == 0
    assert plan.bounds[-1] == len(groups)
    sizes = np.diff(plan.bounds)
    assert (sizes > 0).all()
    assert (sizes <= batch_size).all()
    counts = np.unique(groups, return_counts=True)[1]
    assert steps_of_epoch(counts, batch_size=batch_size, seed=seed, epoch=epoch) == len(sizes)
    ordered = groups[plan.order]
    runs = 1 + np.count_nonzero(ordered[1:] != ordered[:-1])
    assert runs == len(set(groups.tolist()))
    for key in set(groups.tolist()):
        places = np.flatnonzero(ordered == key)
        assert plan.order[places].tolist() == sorted(plan.order[places])  # in file order within the group
        touched = set(np.searchsorted(plan.bounds, places, side="right").tolist())
        assert len(touched) == -(-len(places) // batch_size)  # as few mini-batches as it can be in


def test_mini_batches_are_filled_as_far_as_whole_groups_go() -> None:
    plan = epoch_plan(np.repeat(np.arange(10), 4), batch_size=10, seed=0, epoch=0)
    assert np.diff(plan.bounds).tolist() == [8] * 5
    large = epoch_plan(np.zeros(25, dtype=np.int64), batch_size=10, seed=0, epoch=0)
    assert np.diff(large.bounds).tolist() == [10, 10, 5]


def test_scattered_groups_are_brought_together() -> None:
    plan = epoch_plan(np.tile(np.arange(5), 3), batch_size=3, seed=1, epoch=2)
    assert sorted((plan.order.reshape(5, 3) % 5).tolist()) == [[k] * 3 for k in range(5)]


def test_epochs_and_seeds_differ_and_nothing_global_is_read_or_moved() -> None:
    groups = np.repeat(np.arange(64), 2)

    def order(seed: int, epoch: int) -> list[int]:
        return epoch_plan(groups, batch_size=8, seed=seed, epoch=epoch).order.tolist()

    first = order(3, 1)
    np.random.seed(99)
    random.seed(99)
    state = np.random.get_state()[1].tolist()
    assert order(3, 1) == first
    assert np.random.get_state()[1].tolist() == state
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("size", [1_000_000])
def test_a_million_rollouts(size: int) -> None:
    plan = epoch_plan(np.arange(size) // 8, batch_size=64, seed=0, epoch=0)
    assert len(plan.bounds) == size // 64 + 1


PAIRS = st.lists(st.tuples(st.integers(-6, 6), st.integers(0, 9)), min_size=1, max_size=40)


@given(PAIRS)
def test_what_shares_a_group_or_a_prompt_stays_together(pairs: list[tuple[int, int]]) -> None:
    groups, prompts = (np.asarray(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    sets: list[tuple[set[int], set[int]]] = []
    for group, prompt in pairs:
        touched = [both for both in sets if group in both[0] or prompt in both[1]]
        sets = [both for both in sets if both not in touched]
        sets.append(({group}.union(*(b[0] for b in touched)), {prompt}.union(*(b[1] for b in touched))))
    expected = [next(min(both[0]) for both in sets if group in both[0]) for group in groups.tolist()]
    assert connected_groups(groups, prompts).tolist() == expected


def test_a_prompt_under_several_uids_is_not_held_out_and_trained_on() -> None:
    groups = np.arange(100)
    prompts = np.arange(100) % 40
    kept, held = split_groups(connected_groups(groups, prompts), 0.3, 1)
    assert len(held)
    assert not set(prompts[kept].tolist()) & set(prompts[held].tolist())
