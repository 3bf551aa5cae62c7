"""The nodes of a tree, held against the rollouts' own tokens, one at a time."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support import rollouts_of

from critic_train.layers.prefix_tree import TreeLayout, build_tree_layout, prefix_order
from critic_train.layers.tree_nodes import Nodes, node_batches, padded_positions, tree_nodes, with_context

LISTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=10)


def layout_of(lists: list[list[int]]) -> tuple[TreeLayout, list[list[int]]]:
    """The layout of some rollouts, and the positions of each rollout's tokens."""
    rollouts = rollouts_of([np.asarray(ids, dtype=np.int32) for ids in lists], [0] * len(lists))
    layout = build_tree_layout(rollouts, prefix_order(rollouts))
    return layout, [part.tolist() for part in np.split(layout.token_positions, rollouts.offsets[1:-1])]


def followers(paths: list[list[int]]) -> dict[int, set[int]]:
    """What follows each position in any rollout."""
    after: dict[int, set[int]] = {position: set() for path in paths for position in path}
    for path in paths:
        for one, following in pairwise(path):
            after[one].add(following)
    return after


def test_the_nodes_of_the_tree_in_the_documentation():
    """1 2 3, 1 2 4 5 and 1 6: a node for 1, one for 2, and one for the end of each rollout."""
    layout, _ = layout_of([[1, 2, 3], [1, 2, 4, 5], [1, 6]])
    nodes = tree_nodes(layout)
    assert nodes.start.tolist() == [0, 1, 2, 3, 5]
    assert nodes.length.tolist() == [1, 1, 1, 2, 1]
    assert nodes.parent.tolist() == [-1, 0, 1, 1, 0]
    assert nodes.level.tolist() == [0, 1, 2, 2, 1]


@settings(max_examples=150)
@given(lists=LISTS, longest=st.sampled_from([None, 1, 3]))
def test_nodes_follow_their_parents_and_end_where_rollouts_branch(lists, longest):
    layout, paths = layout_of(lists)
    nodes = tree_nodes(layout, longest)
    assert nodes.start.tolist() == np.cumsum([0, *nodes.length[:-1]]).tolist()
    assert nodes.length.sum() == len(layout)
    after = followers(paths)
    before = {following: one for one, several in after.items() for following in several}
    last = nodes.start + nodes.length - 1
    for node, (start, length, parent, level) in enumerate(
        zip(nodes.start, nodes.length, nodes.parent, nodes.level, strict=True)
    ):
        assert before.get(int(start), -1) == (last[parent] if parent >= 0 else -1)
        assert level == (nodes.level[parent] + 1 if parent >= 0 else 0)
        assert longest is None or length <= longest
        for position in range(start, start + length - 1):
            assert after[position] == {position + 1}
        if longest is None and parent >= 0:  # as few nodes as there can be
            assert len(after[int(last[parent])]) > 1 or last[parent] + 1 != start, node


@settings(max_examples=100)
@given(lists=LISTS, unit=st.sampled_from([1, 4]), waste=st.sampled_from([0.0, 0.25, 1.0]))
def test_batches_hold_every_node_once_after_its_parent_and_waste_little(lists, unit, waste):
    nodes = tree_nodes(layout_of(lists)[0])
    levels = node_batches(nodes, unit, waste)
    seen: list[int] = []
    above: list[int] = []
    for number, batches in enumerate(levels):
        parents = []
        for batch in batches:
            assert (nodes.level[batch.nodes] == number).all()
            units = -(-nodes.length[batch.nodes] // unit)
            assert units.min() >= units.max() * (1 - waste)
            if number:
                assert [above[row] for row in batch.parents] == nodes.parent[batch.nodes].tolist()
            parents += batch.nodes[batch.parent_nodes].tolist()
            seen += batch.nodes.tolist()
        assert len(batches) == 1 or waste < 1
        above = parents
    assert sorted(seen) == list(range(len(nodes.start)))
    assert not above  # no state of the last level is kept


@settings(max_examples=150)
@given(lists=LISTS, context=st.integers(1, 6))
def test_every_position_stands_after_the_tokens_before_it_in_its_rollout(lists, context):
    layout, paths = layout_of(lists)
    sequence, index = with_context(layout, context)
    assert sequence[index].tolist() == list(range(len(layout)))
    for path in paths:
        padded = [len(layout)] * context + path
        for depth, position in enumerate(path):
            stop = int(index[position])
            assert sequence[stop - context : stop].tolist() == padded[depth : depth + context]


def test_rows_are_padded_with_a_position_that_is_none():
    nodes = Nodes(
        start=np.asarray([0, 2, 5]),
        length=np.asarray([2, 3, 1]),
        parent=np.asarray([-1, 0, 0]),
        level=np.asarray([0, 1, 1]),
    )
    assert padded_positions(nodes, np.asarray([1, 2])).tolist() == [[2, 3, 4], [5, 6, 6]]
