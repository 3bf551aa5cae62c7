"""Work is shared out evenly, every rollout once, and costs what a forest of its own would."""

from pathlib import Path

import numpy as np
import pytest
from support import branching_rollouts

from critic_train.data.reading import Needs, RolloutReader
from critic_train.data.shards import find_shards
from critic_train.layers.prefix_tree import PrefixOrder, attention_mask, build_tree_layout, prefix_order
from critic_train.model.work_sharing import Cost, Exchanges, Pieces, longest_first, shares
from critic_train.rollouts import Rollouts

SAMPLE = Path(__file__).parents[3] / "sample_data"
COST = Cost(pair=0.01)


def pieces_of(rollouts: Rollouts) -> Pieces:
    return Pieces(prefix_order(rollouts), rollouts.lengths, COST)


def part(rollouts: Rollouts, start: int, stop: int) -> PrefixOrder:
    order = prefix_order(rollouts)
    return PrefixOrder(index=order.index[start:stop], shared=np.append(0, order.shared[start + 1 : stop]))


def test_the_cost_of_a_run_is_counted_off_its_forest():
    rollouts = branching_rollouts()
    pieces = pieces_of(rollouts)
    for start, stop in ((0, len(rollouts)), (0, 1), (3, 9), (5, 6), (10, len(rollouts))):
        forest = build_tree_layout(rollouts, part(rollouts, start, stop))
        pairs = int(attention_mask(forest).sum())
        assert pieces.tokens(start, stop) == len(forest)
        assert pieces.work(start, stop) == pytest.approx(len(forest) + 0.01 * pairs)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("max_tokens", [1, 40, 100, 10_000])
def test_every_rollout_is_computed_once_and_no_micro_batch_is_too_large(ranks, max_tokens):
    rollouts = branching_rollouts()
    pieces = pieces_of(rollouts)
    every = shares(pieces, ranks, max_tokens)
    assert len(every) == ranks
    assert len({len(mine) for mine in every}) == 1
    assert sorted(np.concatenate([places for mine in every for places in mine])) == list(range(len(rollouts)))
    for places in (places for mine in every for places in mine):
        assert len(places) <= 1 or len(build_tree_layout(rollouts, prefix_order(rollouts).part(places))) <= max_tokens


def test_fewer_rollouts_than_ranks_leave_some_with_nothing():
    rollouts = branching_rollouts().take(np.asarray([0, 5]))
    every = shares(pieces_of(rollouts), 5, 100)
    assert sorted(len(mine[0]) > 0 for mine in every) == [False, False, False, True, True]


def test_ranks_are_level_on_real_rollouts_and_so_is_what_they_do_at_one_time():
    """The issue asks for at most 1.02 of the mean; round robin over trees leaves 1.1 to 4."""
    shards = find_shards([str(SAMPLE / "train")] if (SAMPLE / "train").is_dir() else [str(SAMPLE)])
    rollouts = max(RolloutReader(shards, needs=Needs(values=False)), key=len)
    order = prefix_order(rollouts)
    pieces = Pieces(order, rollouts.lengths, Cost.of(106_000_000, layers=30, width=576))
    whole = sum(float(pieces.work(*tree)) for tree in pieces.trees(1024))
    for ranks in (2, 3, 4, 8):
        every = shares(pieces, ranks, 1024)
        work = np.asarray([[pieces.work_together(places) for places in mine] for mine in every])
        assert work.sum(1).max() / work.sum(1).mean() <= 1.02
        assert work.max(0).sum() * ranks / work.sum() <= 1.03
        assert work.sum() <= 1.1 * whole


@pytest.mark.parametrize(("ranks", "most"), [(2, 1.01), (3, 1.015), (4, 1.015), (8, 1.05)])
def test_even_64_short_rollouts_are_dealt_out_evenly(ranks, most):
    """Trees and their ends alone leave 1.05 to 1.09 on four and eight ranks."""
    rollouts = next(iter(RolloutReader(find_shards([str(SAMPLE / "train")]), needs=Needs(values=False))))
    for start in range(0, len(rollouts) - 64, 64):
        step = rollouts.take(np.arange(start, start + 64))
        pieces = Pieces(prefix_order(step), step.lengths, Cost.of(106_000_000, layers=30, width=576))
        work = np.asarray([[pieces.work_together(places) for places in mine] for mine in shares(pieces, ranks, 1024)])
        assert work.sum(1).max() / work.sum(1).mean() <= most


def test_places_with_gaps_cost_what_their_forest_does():
    rollouts = branching_rollouts()
    order, pieces = prefix_order(rollouts), pieces_of(rollouts)
    exchanges = Exchanges(pieces.full, pieces.shared, 0.01)
    for places in ([0, 2, 3, 7], [1], [4, 9, 10, 11], list(range(0, len(rollouts), 3))):
        kept = np.asarray(places)
        forest = build_tree_layout(rollouts, order.part(kept))
        cost = len(forest) + 0.01 * int(attention_mask(forest).sum())
        assert pieces.work_together(kept) == pytest.approx(cost)
        assert exchanges.work(kept) == pytest.approx(cost)
        assert exchanges.tokens(kept) == len(forest)


def test_an_exchange_helps_the_busiest_and_keeps_the_budget():
    """Five rollouts without a common token, 9 7 6 5 5 tokens: 9 + 7 against 6 + 5 + 5 is the best of all deals."""
    lengths = np.asarray([9, 7, 6, 5, 5])
    exchanges = Exchanges(lengths, np.zeros(5, dtype=np.int64), 0.0)
    apart = [np.asarray([0, 1, 2]), np.asarray([3, 4])]
    level = exchanges.level(apart, 100, 1.0)
    assert [exchanges.tokens(places) for places in level] == [16, 16]
    assert [places.tolist() for places in exchanges.level(apart, 15, 1.0)] == [[0, 1, 2], [3, 4]]


def test_longest_first_is_grahams():
    held = longest_first([7.0, 7.0, 6.0, 6.0, 5.0, 5.0, 4.0, 4.0, 4.0], 4)
    loads = sorted(sum([7, 7, 6, 6, 5, 5, 4, 4, 4][item] for item in items) for items in held)
    assert loads == [11, 11, 11, 15]  # Graham's worst case: 4/3 - 1/12 of the best, 12
