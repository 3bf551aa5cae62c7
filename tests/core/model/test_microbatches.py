import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import branching_rollouts, rollouts_of, small_config

from critic_train.layers.prefix_tree import build_tree_layout
from critic_train.model.compute import Compute
from critic_train.model.microbatches import (
    best_fit_decreasing,
    forest_micro_batches,
    frequency_limit,
    micro_batches,
    shared_micro_batches,
)


def test_the_fullest_bin_that_takes_an_item_gets_it():
    # 7 opens a bin, 6 another; 4 fits the second alone (room 4), 3 the first alone (room 3): both are full then.
    assert best_fit_decreasing([3, 6, 7, 4], 10) == [[2, 0], [1, 3]]
    # 8 and 5 leave 2 and 5: 2 goes where it leaves nothing.
    assert best_fit_decreasing([5, 2, 8], 10) == [[2, 1], [0]]
    assert best_fit_decreasing([12, 3], 10) == [[0], [1]]
    assert best_fit_decreasing([], 10) == []


@given(st.lists(st.integers(1, 12), max_size=30))
def test_bins_hold_every_item_once_and_two_of_them_never_fit_in_one(sizes):
    bins = best_fit_decreasing(sizes, 10)
    assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
    loads = [sum(sizes[item] for item in members) for members in bins]
    assert all(load <= 10 or len(members) == 1 for load, members in zip(loads, bins, strict=True))
    assert all(one + other > 10 for one, other in itertools.combinations(loads, 2))


@pytest.mark.parametrize("max_tokens", [1, 40, 90, 10_000])
def test_trees_stay_whole_where_they_fit(max_tokens):
    rollouts = branching_rollouts()
    parts = forest_micro_batches(rollouts, max_tokens)
    assert sorted(np.concatenate([part.index for part in parts]).tolist()) == list(range(len(rollouts)))
    whole = len(build_tree_layout(rollouts, forest_micro_batches(rollouts, 10_000)[0]))
    computed = sum(len(build_tree_layout(rollouts, part)) for part in parts)
    assert (computed == whole) == (max_tokens >= 90)
    assert all(len(build_tree_layout(rollouts, part)) <= max_tokens or len(part) == 1 for part in parts)


@pytest.mark.parametrize("forest", [True, False])
@pytest.mark.parametrize("ranks", [1, 3])
def test_no_micro_batch_holds_rollouts_of_both_frequencies(forest, ranks):
    """With rope_type longrope, a model takes the frequencies of all rows by the longest of them."""
    rollouts = branching_rollouts()
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=90, frequency_limit=24)
    held = []
    for rank in range(ranks):
        if ranks > 1:
            compute.ranks = FakeRanks(rank, ranks)
            batches = [part.index for part in shared_micro_batches(rollouts, compute, forest=forest)]
        else:
            owner = np.repeat(np.arange(len(rollouts)), rollouts.lengths)
            batches = [np.unique(owner[b.all_tokens]) for b in micro_batches(rollouts, compute, forest=forest)]
        assert all(len(set((rollouts.lengths[index] > 24).tolist())) <= 1 for index in batches)
        held += [int(i) for index in batches for i in index]
    assert sorted(held) == list(range(len(rollouts)))


class FakeRanks:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def test_the_limit_is_that_of_longrope_and_of_nothing_else():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    within = {**rope, "original_max_position_embeddings": 64}
    config = small_config("Phi3", original_max_position_embeddings=64, rope_parameters=within, num_key_value_heads=4)
    assert frequency_limit(config) == 64
    beside = small_config("Phi3", rope_parameters=rope, original_max_position_embeddings=32, num_key_value_heads=4)
    assert frequency_limit(beside) == 32
    assert frequency_limit(small_config("Llama")) is None
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert frequency_limit(small_config("Llama", rope_parameters=dynamic)) is None


def test_rows_one_at_a_time_are_not_padded():
    rollouts = branching_rollouts()
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000, one_row=True)
    batches = list(micro_batches(rollouts, compute, forest=False))
    assert [batch.computed_tokens for batch in batches] == sorted(rollouts.lengths.tolist(), reverse=True)
    assert all(set(batch.trunk_arguments) == {"input_ids"} for batch in batches)


def test_a_window_of_a_thousand_and_more_rollouts_fills_the_budget():
    """Groups of 8, lengths as in a real dump: all but the emptiest micro-batch are at least 98.5 % full."""
    draw = np.random.default_rng(0)
    sequences, prompts = [], []
    for _ in range(256):
        prompt = draw.integers(0, 128, int(np.clip(draw.lognormal(3.3, 0.5), 4, 200)))
        for _ in range(8):
            response = draw.integers(0, 128, int(np.clip(draw.lognormal(3.2, 0.7), 2, 400)))
            sequences.append(np.concatenate([prompt, response]).astype(np.int32))
            prompts.append(len(prompt))
    rollouts = rollouts_of(sequences, prompts)
    sizes = sorted(len(build_tree_layout(rollouts, part)) for part in forest_micro_batches(rollouts, 2048))
    assert np.mean(sizes[1:]) / 2048 >= 0.985
