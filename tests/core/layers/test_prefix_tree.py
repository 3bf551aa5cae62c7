import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import branching_rollouts, rollouts_of

from critic_train.layers.prefix_tree import PrefixOrder, attention_mask, build_tree_layout, prefix_order
from critic_train.rollouts import Rollouts


def rollouts_from(lists: list[list[int]]) -> Rollouts:
    return rollouts_of([np.asarray(ids, dtype=np.int32) for ids in lists], [1] * len(lists))


def test_a_forest_drawn_by_hand():
    # 1 2 3 4        positions 0 1 2 3
    # 1 2 3 5 6      shares 1 2 3, adds 4 5
    # 1 7            shares 1, adds 6
    # 8 9            a tree of its own, 7 8
    rollouts = rollouts_from([[1, 7], [8, 9], [1, 2, 3, 5, 6], [1, 2, 3, 4]])
    order = prefix_order(rollouts)
    layout = build_tree_layout(rollouts, order)
    assert order.index.tolist() == [3, 2, 0, 1]
    assert order.shared.tolist() == [0, 3, 1, 0]
    assert layout.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert layout.depth.tolist() == [0, 1, 2, 3, 3, 4, 1, 0, 1]
    assert layout.end.tolist() == [7, 6, 6, 4, 6, 6, 7, 9, 9]
    assert layout.token_positions.tolist() == [0, 6, 7, 8, 0, 1, 2, 4, 5, 0, 1, 2, 3]
    assert [segment.path for segment in layout.segments] == [((0, 4),), ((0, 3), (4, 6)), ((0, 1), (6, 7)), ((7, 9),)]


def check_layout(rollouts: Rollouts) -> None:
    """Every rollout's tokens stand on its path; a position sees exactly its ancestors and itself."""
    layout = build_tree_layout(rollouts, prefix_order(rollouts))
    visible = attention_mask(layout)
    seen: dict[tuple[int, ...], int] = {}
    for start, stop in zip(rollouts.offsets[:-1], rollouts.offsets[1:], strict=True):
        path = layout.token_positions[start:stop]
        ids = rollouts.input_ids[start:stop]
        np.testing.assert_array_equal(layout.input_ids[path], ids)
        np.testing.assert_array_equal(layout.depth[path], np.arange(stop - start))
        for depth, position in enumerate(path.tolist()):
            np.testing.assert_array_equal(np.flatnonzero(visible[position]), path[: depth + 1])
            # A prefix stands at one position only, whichever rollout it came from.
            assert seen.setdefault(tuple(ids[: depth + 1].tolist()), position) == position
    assert len(seen) == len(layout)


@pytest.mark.parametrize("seed", range(3))
def test_paths_and_visibility_of_branching_rollouts(seed):
    check_layout(branching_rollouts(seed))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=9))
def test_paths_and_visibility_of_any_rollouts(lists):
    check_layout(rollouts_from(lists))


def test_sorting_follows_token_ids_not_their_bytes():
    rollouts = rollouts_from([[256, 1], [1, 256], [255, 0], [65536, 0]])
    assert prefix_order(rollouts).index.tolist() == [1, 2, 0, 3]


def test_a_part_of_an_order_is_laid_out_alone():
    rollouts = branching_rollouts()
    order = prefix_order(rollouts)
    part = PrefixOrder(index=order.index[4:9], shared=np.append(0, order.shared[5:9]))
    layout = build_tree_layout(rollouts, part)
    tokens = np.concatenate(
        [np.arange(rollouts.offsets[i], rollouts.offsets[i + 1]) for i in sorted(part.index.tolist())]
    )
    np.testing.assert_array_equal(layout.input_ids[layout.token_positions], rollouts.input_ids[tokens])
