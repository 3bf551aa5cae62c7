"""Trees larger than a micro-batch are cut where the least is computed twice."""

import itertools

import numpy as np
import pytest
from support import rollouts_of

from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.model.tree_cuts import tree_pieces


def random_tree(seed, rollouts=7):
    """Rollouts of one prompt, each of which leaves an earlier one at a random token."""
    draw = np.random.default_rng(seed)
    sequences = [draw.integers(1, 100, int(draw.integers(8, 40)))]
    for _ in range(rollouts - 1):
        stem = sequences[int(draw.integers(len(sequences)))]
        leave = int(draw.integers(1, len(stem)))
        sequences.append(np.concatenate([stem[:leave], draw.integers(1, 100, int(draw.integers(1, 30)))]))
    return rollouts_of([s.astype(np.int32) for s in sequences], [1] * rollouts)


def positions_of(rollouts, order, start, stop):
    """As the layout counts them."""
    return len(build_tree_layout(rollouts, order.part(np.arange(start, stop))))


def smallest_total(rollouts, order, max_tokens):
    """Over all ways to cut, tried one by one."""
    n, totals = len(order), []
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(n)):
        runs = list(itertools.pairwise([0, *cuts, n]))
        sizes = [positions_of(rollouts, order, *run) for run in runs]
        if all(size <= max_tokens or stop - start == 1 for size, (start, stop) in zip(sizes, runs, strict=True)):
            totals.append((sum(sizes), len(runs)))
    return min(totals)


@pytest.mark.parametrize("seed", range(12))
def test_no_other_cuts_compute_less(seed):
    rollouts = random_tree(seed)
    order = prefix_order(rollouts)
    lengths = rollouts.lengths[order.index]
    for max_tokens in (5, 45, 60, 90, 1000):
        pieces = tree_pieces(lengths, order.shared, max_tokens)
        assert [p for run in pieces for p in range(*run)] == list(range(len(order)))
        sizes = [positions_of(rollouts, order, *run) for run in pieces]
        assert (sum(sizes), len(pieces)) == smallest_total(rollouts, order, max_tokens)
        greedy = tree_pieces(lengths, order.shared, max_tokens, as_they_come=True)
        assert sum(sizes) <= sum(positions_of(rollouts, order, *run) for run in greedy)


def test_cuts_go_where_little_is_shared():
    # Two turns of 100 and 90 tokens, branching in pairs: the cut between the pairs repeats 10 tokens, others 100.
    shared, lengths = np.array([0, 100, 10, 100]), np.array([110, 110, 110, 110])
    assert tree_pieces(lengths, shared, 225) == [(0, 2), (2, 4)]
    assert tree_pieces(lengths, shared, 225, as_they_come=True) == [(0, 3), (3, 4)]


def test_trees_stay_apart_and_a_longer_rollout_is_a_piece():
    lengths, shared = np.array([5, 6, 50, 7]), np.array([0, 2, 0, 3])
    assert tree_pieces(lengths, shared, 20) == [(0, 2), (2, 3), (3, 4)]
    assert tree_pieces(lengths[:0], shared[:0], 20) == []
