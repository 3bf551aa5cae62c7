"""The indices of the calls that recurrent layers make: every position once, states in the order of the levels."""

import numpy as np
import pytest
import torch
from support import branching_rollouts

from critic_train.layers import tree_states
from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.layers.tree_states import TreeStates, rearranged, taken

ROLLOUTS = branching_rollouts()
LAYOUT = build_tree_layout(ROLLOUTS, prefix_order(ROLLOUTS))
CPU = torch.device("cpu")


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_a_sum_along_the_tree_is_that_of_every_rollout(form, monkeypatch):
    """A state that is the sum of what came before: computed by the calls, and along every rollout by itself."""
    monkeypatch.setattr(tree_states, "LONGEST_NODE", 5)
    calls = getattr(TreeStates(LAYOUT, CPU), form)
    numbers = torch.arange(1.0, len(LAYOUT) + 1)
    given = taken(numbers[:, None], calls.positions)[:, 0]
    outputs, above, done = [], None, 0
    for level in calls.levels:
        finals = []
        for call in level:
            part = given[done : done + call.shape[0] * call.shape[1]].view(call.shape)
            done += part.numel()
            bounds = call.bounds
            rows = list(part) if bounds is None else list(part[0].split(np.diff(bounds.numpy()).tolist()))
            starts = torch.zeros(len(rows)) if above is None else above[call.parents]
            sums = [row.cumsum(0) + start for row, start in zip(rows, starts, strict=True)]
            outputs += sums
            finals.append(torch.stack([row[-1] for row in sums])[call.parent_nodes])
        above = torch.cat(finals)
    on_tree = torch.cat(outputs)[calls.index].numpy()
    expected = [np.cumsum(path + 1.0) for path in np.split(LAYOUT.token_positions, ROLLOUTS.offsets[1:-1])]
    np.testing.assert_array_equal(on_tree[LAYOUT.token_positions], np.concatenate(expected))


def test_the_gradient_of_rows_in_another_order_is_that_of_indexing():
    calls = TreeStates(LAYOUT, CPU).padded
    rows = torch.randn(len(LAYOUT), 3, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(len(calls.positions), 3, dtype=torch.float64)
    ours = rearranged(rows, calls.positions, calls.index)
    theirs = torch.cat([rows, torch.zeros(1, 3)])[calls.positions]
    assert torch.equal(ours, theirs)
    (found,) = torch.autograd.grad(ours, rows, slope)
    (expected,) = torch.autograd.grad(theirs, rows, slope)
    assert torch.equal(found, expected)
