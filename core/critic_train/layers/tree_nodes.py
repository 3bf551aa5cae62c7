"""The nodes of a prefix-tree layout: what a layer with a recurrent state goes through one after another.

A node is a run of positions that follow one another in every rollout that has them. It ends where rollouts branch. A
recurrent state is computed once per node, from the state at the end of its parent, so nodes whose parents are done go
through a layer together, level after level: a prompt with n responses has two levels. Long nodes are cut into parts,
each the parent of the next, because transformers' recurrences in torch take time that grows with the square of the
length in their backward pass.

A short convolution needs no state: its inputs are the few tokens before each token in its rollout.

Shapes: S positions of the layout, m segments, N nodes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from critic_train.layers.prefix_tree import TreeLayout
from critic_train.rollouts import repeat_by_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes of a layout, left to right.

    Attributes:
        start: int64 [N], the first position of each; the nodes cover all positions.
        length: int64 [N], its positions.
        parent: int64 [N], the node that ends right before it in its rollouts; -1 for the first node of a tree.
        level: int64 [N], the number of nodes above it.
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    parent: NDArray[np.int64]
    level: NDArray[np.int64]


def tree_nodes(layout: TreeLayout, longest: int | None = None) -> Nodes:
    """The nodes of a layout.

    Args:
        layout: the layout.
        longest: longer nodes are cut into parts of at most so many positions; None leaves them whole.
    """
    size = len(layout)
    above = _parents_of_segments(layout)
    starts = layout.segment_starts[:-1]
    children = np.append(np.ones(size - 1, dtype=np.int64), 0)  # of every position: the next one of its segment
    children[starts[1:] - 1] = 0
    np.add.at(children, above[above >= 0], 1)
    # A node begins after every position that is not continued by the next one alone.
    begins = np.append(True, children[:-1] != 1)
    begins[starts[above != starts - 1]] = True
    start = np.flatnonzero(begins)
    length = np.diff(np.append(start, size))
    is_first = np.zeros(size, dtype=np.bool_)
    is_first[starts] = True
    before = start - 1
    before[is_first[start]] = above[np.searchsorted(starts, start[is_first[start]])]
    if longest is not None:
        start, length, before = _cut(start, length, before, longest)
    parent = np.where(before >= 0, np.searchsorted(start, before, side="right") - 1, -1)
    level: list[int] = []
    for node in parent.tolist():  # parents stand left of their children
        level.append(level[node] + 1 if node >= 0 else 0)
    return Nodes(start=start, length=length, parent=parent, level=np.asarray(level, dtype=np.int64))


def _parents_of_segments(layout: TreeLayout) -> NDArray[np.int64]:
    """int64 [m]: the position before the first one that each segment adds, in its rollout; -1 where there is none."""
    last = layout.path_offsets[1:] - 1
    starts = layout.segment_starts[:-1]
    own_span_starts = layout.path_spans[last, 0]  # at the segment's first position, or before it
    ends_before = np.where(last > layout.path_offsets[:-1], layout.path_spans[last - 1, 1] - 1, -1)
    return np.where(own_span_starts < starts, starts - 1, ends_before)


def _cut(
    start: NDArray[np.int64], length: NDArray[np.int64], before: NDArray[np.int64], longest: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Nodes of at most `longest` positions: (start, length, the position before the first)."""
    parts = -(-length // longest)
    first = repeat_by_length(np.zeros(len(parts), dtype=np.int64), parts)  # the number of each part within its node
    cut_start = np.repeat(start, parts) + first * longest
    cut_before = np.where(first == 0, np.repeat(before, parts), cut_start - 1)
    return cut_start, np.diff(np.append(cut_start, start[-1] + length[-1])), cut_before


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeBatch:
    """Nodes of one level that go through a recurrence in one call.

    Attributes:
        nodes: int64 [n], indices into `Nodes`, the longest first.
        parents: int64 [n], their parents, as indices into the `parent_nodes` of all batches of the level above, one
            after another; None for the first nodes of trees.
        parent_nodes: int64 [k], which of the n nodes are parents.
    """

    nodes: NDArray[np.int64]
    parents: NDArray[np.int64] | None
    parent_nodes: NDArray[np.int64]


def node_batches(nodes: Nodes, unit: int, waste: float) -> list[list[NodeBatch]]:
    """The calls of a recurrence, level by level.

    Nodes of one level are batched by length, so that ragged ones waste little.

    Args:
        nodes: of a layout.
        unit: what the recurrence rounds a length up to: its chunk.
        waste: a node may be shorter than the longest of its batch by this share, in units; 1 makes one call a level.
    """
    is_parent = np.zeros(len(nodes.start), dtype=np.bool_)
    is_parent[nodes.parent[nodes.parent >= 0]] = True
    number = np.full(len(nodes.start), -1)  # of each parent among those of its level
    levels = []
    for level in range(int(nodes.level.max()) + 1):
        members = np.flatnonzero(nodes.level == level)
        members = members[np.argsort(-nodes.length[members], kind="stable")]
        batches = []
        count = 0
        for group in _by_length(members, -(-nodes.length[members] // unit), waste):
            parent_nodes = np.flatnonzero(is_parent[group])
            number[group[parent_nodes]] = count + np.arange(len(parent_nodes))
            count += len(parent_nodes)
            parents = number[nodes.parent[group]] if level else None
            batches.append(NodeBatch(nodes=group, parents=parents, parent_nodes=parent_nodes))
        levels.append(batches)
    return levels


def _by_length(members: NDArray[np.int64], units: NDArray[np.int64], waste: float) -> list[NDArray[np.int64]]:
    """Groups of nodes of about one length; `members` and their lengths in `units` are given longest first."""
    groups = []
    first = 0
    while first < len(members):
        stop = int(np.searchsorted(-units, -units[first] * (1 - waste), side="right"))
        groups.append(members[first:stop])
        first = stop
    return groups


def with_context(layout: TreeLayout, context: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The layout as one sequence in which every segment follows the last tokens before it in its rollout.

    A causal convolution over that sequence gives every position what it gives it in its rollout.

    Args:
        layout: the layout.
        context: tokens before each token that the convolution reaches.

    Returns:
        (int64 [S + m * context], the positions of the sequence, S where there is no token; int64 [S], where each
        position stands in it).
    """
    starts = layout.segment_starts
    above = _parents_of_segments(layout)
    segment = np.repeat(np.arange(len(above)), np.diff(starts))
    lead = np.full((len(above), context), len(layout))
    at = above.copy()
    for column in reversed(range(context)):
        exists = at >= 0
        lead[exists, column] = at[exists]
        first = exists & (at == starts[segment[at]])
        at = np.where(first, above[segment[at]], np.where(exists, at - 1, -1))
    index = np.arange(len(layout)) + (segment + 1) * context
    sequence = np.empty(len(layout) + lead.size, dtype=np.int64)
    sequence[index] = np.arange(len(layout))
    leads = starts[:-1] + np.arange(len(above)) * context
    sequence[leads[:, None] + np.arange(context)] = lead
    return sequence, index


def padded_positions(nodes: Nodes, members: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n, width]: the positions of some nodes, and S where a node has fewer than the longest of them."""
    size = int(nodes.start[-1] + nodes.length[-1])
    columns = np.arange(int(nodes.length[members].max()))
    return np.where(columns < nodes.length[members, None], nodes.start[members, None] + columns, size)
