"""Both layouts against a walk over single tokens: what is at each position, and where each value is read."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import branching_rollouts, rollouts_of, small_config

from critic_train.layers.prefix_tree import prefix_order
from critic_train.model.model_input import empty_input, padded_input, tree_input
from critic_train.model.selfcheck import choose_packing
from critic_train.weights.loading import build_critic

CPU = torch.device("cpu")
EVERY = np.arange(21)
SOME = np.asarray([17, 2, 9, 3, 20])  # rollouts of a micro-batch, in no order


def lay_out(layout, rollouts, index):
    if layout == "rows":
        return padded_input(rollouts, index, CPU)
    order = prefix_order(rollouts)
    return tree_input(rollouts, order.part(np.flatnonzero(np.isin(order.index, index))), CPU)


def tokens_of(rollouts, index):
    """(token, rollout, its index in the rollout) of some rollouts, in the order of the mini-batch."""
    return [
        (int(token), int(number), int(token - rollouts.offsets[number]))
        for number in sorted(index)
        for token in range(rollouts.offsets[number], rollouts.offsets[number + 1])
    ]


def prefixes(rollouts, index):
    """Token -> the tokens of its rollout up to and including it."""
    ids = rollouts.input_ids
    return {
        token: tuple(ids[rollouts.offsets[number] : token + 1].tolist())
        for token, number, _ in tokens_of(rollouts, index)
    }


@pytest.mark.parametrize("index", [EVERY, SOME, SOME[:1]], ids=["all", "some", "one"])
@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_every_token_has_a_position_and_every_response_token_is_read_before_it(layout, index):
    rollouts = branching_rollouts()
    batch = lay_out(layout, rollouts, index)
    walk = tokens_of(rollouts, index)
    assert batch.all_tokens.tolist() == [token for token, _, _ in walk]
    position = dict(zip(batch.all_tokens.tolist(), batch.token_positions.tolist(), strict=True))
    ids = batch.trunk_arguments["input_ids"].flatten()
    assert ids.dtype == torch.int64
    assert len(ids) == batch.computed_tokens
    assert [int(ids[position[token]]) for token, _, _ in walk] == [int(rollouts.input_ids[t]) for t, _, _ in walk]
    response = [token for token, _, _ in walk if rollouts.response_mask[token]]
    assert batch.response_tokens.tolist() == response
    # V(s_t) is read off the hidden state of token t - 1.
    read = batch.read_positions[batch.value_index].tolist()
    assert read == [position[token - 1] for token in response]
    assert batch.read_positions.tolist() == sorted(set(read))


@pytest.mark.parametrize("index", [EVERY, SOME], ids=["all", "some"])
def test_a_tree_computes_and_reads_each_prefix_once(index):
    rollouts = branching_rollouts()
    batch = lay_out("tree", rollouts, index)
    paths = prefixes(rollouts, index)
    position = dict(zip(batch.all_tokens.tolist(), batch.token_positions.tolist(), strict=True))
    assert len({(position[token], path) for token, path in paths.items()}) == len(set(paths.values()))
    assert batch.computed_tokens == len(set(paths.values())) < len(paths)
    states = {paths[token - 1] for token in batch.response_tokens.tolist()}
    assert len(batch.read_positions) == len(states) < len(batch.response_tokens)
    depth = batch.trunk_arguments["position_ids"].flatten()
    assert all(int(depth[position[token]]) == len(path) - 1 for token, path in paths.items())


def test_rows_are_padded_on_the_right():
    rollouts = branching_rollouts()
    batch = lay_out("rows", rollouts, SOME)
    ids, mask = batch.trunk_arguments["input_ids"], batch.trunk_arguments["attention_mask"]
    lengths = rollouts.lengths[np.sort(SOME)]
    assert ids.shape == mask.shape == (len(SOME), lengths.max())
    assert mask.tolist() == [[1] * n + [0] * (lengths.max() - n) for n in lengths.tolist()]
    assert not ids[mask == 0].any()
    for row, number in zip(ids, sorted(SOME), strict=True):
        own = rollouts.input_ids[rollouts.offsets[number] : rollouts.offsets[number + 1]]
        assert row[: len(own)].tolist() == own.tolist()


def test_where_the_last_layer_skips_positions_those_that_are_read_are_counted_among_the_rest():
    """The long prompt is skipped, an observation of 20 tokens is too short to be."""
    draw = np.random.default_rng(0)
    sequences = [draw.integers(1, 128, 400).astype(np.int32) for _ in range(2)]
    rollouts = rollouts_of(sequences, [300, 300])
    batch = tree_input(rollouts, prefix_order(rollouts), CPU)
    assert batch.read_in_last_layer is None  # it computes what is read and nothing else
    assert batch.trunk_arguments["tree_plan"].needed_positions.tolist() == batch.read_positions.tolist()
    rollouts.response_mask[330:350] = False
    batch = tree_input(rollouts, prefix_order(rollouts), CPU)
    needed = batch.trunk_arguments["tree_plan"].needed_positions
    assert len(needed) == len(batch.read_positions) + 20 < batch.computed_tokens
    assert needed[batch.read_in_last_layer].tolist() == batch.read_positions.tolist()


@pytest.mark.parametrize("forest", [True, False], ids=["tree", "rows"])
def test_a_rank_without_work_computes_one_position_and_no_value(forest):
    rollouts = branching_rollouts()
    batch = empty_input(rollouts, CPU, forest=forest)
    assert batch.computed_tokens == batch.trunk_arguments["input_ids"].numel() == 1
    assert not len(batch.response_tokens)
    assert not len(batch.all_tokens)
    assert not len(batch.token_positions)
    critic = build_critic(small_config("Llama"), seed=0)
    assert choose_packing(critic, rollouts, "forest" if forest else "rows").forest == forest
    values = critic(batch)
    assert values.shape == (0,)
    values.sum().backward()  # the ranks that work wait for this one's gradients


def test_a_response_that_begins_after_one_prompt_token_reads_the_first_position():
    one = branching_rollouts().take(np.zeros(1, dtype=np.int64))
    mask = np.arange(len(one.input_ids)) > 0
    one = replace(one, response_mask=mask)
    for layout in ("tree", "rows"):
        batch = lay_out(layout, one, np.zeros(1, dtype=np.int64))
        assert batch.read_positions.tolist() == list(range(len(mask) - 1))
        assert batch.value_index.tolist() == list(range(len(mask) - 1))
