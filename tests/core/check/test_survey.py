"""A survey's figures, counted again by hand."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from support import readable_rollouts

from critic_train.check.survey import Survey, distribution, leak, lengths_of
from critic_train.rollouts import Rollouts, concat_rollouts


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return concat_rollouts([readable_rollouts(30, seed=1), readable_rollouts(20, seed=2)])


def surveyed(*batches: Rollouts) -> Survey:
    survey = Survey()
    for batch in batches:
        survey.add(batch)
    return survey


def tokens_of(rollouts: Rollouts) -> list[tuple[int, ...]]:
    return [tuple(rollouts.input_ids[a:b].tolist()) for a, b in pairwise(rollouts.offsets.tolist())]


def prompt_of(rollouts: Rollouts, i: int) -> tuple[int, ...]:
    start, stop = rollouts.offsets[i], rollouts.offsets[i + 1]
    first = int(np.argmax(rollouts.response_mask[start:stop]))
    return tuple(rollouts.input_ids[start : start + first].tolist())


def test_counts_and_lengths(rollouts):
    told = surveyed(rollouts.take(np.arange(7)), rollouts.take(np.arange(7, len(rollouts)))).summary()
    prompts = [prompt_of(rollouts, i) for i in range(len(rollouts))]
    assert told["rollouts"] == len(rollouts)
    assert told["prompts"] == len(set(prompts))
    assert told["prompt_groups"] == len(set(rollouts.group.tolist()))
    assert told["tokens"] == len(rollouts.input_ids)
    assert told["response_tokens"] == int(rollouts.response_mask.sum())
    lengths = sorted(map(len, prompts))
    found = told["prompt_length"]
    assert (found["min"], found["max"]) == (lengths[0], lengths[-1])
    assert found["mean"] == pytest.approx(np.mean(lengths))
    assert sum(found["histogram"]["counts"]) == len(rollouts)


def test_sharing_counts_the_nodes_of_a_trie(rollouts):
    nodes = {row[:end] for row in tokens_of(rollouts) for end in range(1, len(row) + 1)}
    assert surveyed(rollouts).summary()["sharing"]["computed_tokens"] == len(nodes)


def test_duplicates_are_rollouts_with_the_tokens_of_another(rollouts):
    repeated = rollouts.take(np.asarray([0, 0, 3, 0], dtype=np.int64))
    rows = tokens_of(rollouts) + tokens_of(repeated)
    assert surveyed(rollouts, repeated).summary()["duplicates"] == len(rows) - len(set(rows))


def test_stored_values_are_judged(rollouts):
    assert rollouts.values is not None
    g, v = rollouts.returns[rollouts.response_mask], rollouts.values[rollouts.response_mask]
    told = surveyed(rollouts).summary()
    expected = 1 - np.var((g - v).astype(np.float64)) / np.var(g.astype(np.float64))
    assert told["stored_values"]["explained_variance"] == pytest.approx(expected, abs=1e-9)
    assert surveyed(replace(rollouts, values=None)).summary()["stored_values"] is None


def test_rewards_are_summed_over_a_rollouts_response(rollouts):
    rewards = np.random.default_rng(0).integers(0, 2, len(rollouts.input_ids)).astype(np.float32)
    told = surveyed(replace(rollouts, rewards=rewards)).summary()["rewards"]
    sums = [rewards[a:b][rollouts.response_mask[a:b]].sum() for a, b in pairwise(rollouts.offsets.tolist())]
    assert (told["min"], told["max"]) == (min(sums), max(sums))
    assert told["mean"] == pytest.approx(np.mean(sums))


def test_the_mask_share_is_of_what_follows_the_first_response_token(rollouts):
    mask = rollouts.response_mask.copy()
    first_of_each = rollouts.offsets[:-1] + [len(prompt_of(rollouts, i)) for i in range(len(rollouts))]
    second = first_of_each + 1
    inside = second < rollouts.offsets[1:]
    mask[second[inside]] = False
    told = surveyed(replace(rollouts, response_mask=mask)).summary()
    span = int((rollouts.offsets[1:] - first_of_each).sum())
    assert told["mask_share"] == pytest.approx(mask.sum() / span)


def test_a_leak_is_a_prompt_on_both_sides(rollouts):
    mine, theirs = rollouts.take(np.arange(0, 30)), rollouts.take(np.arange(20, 50))
    found = leak(surveyed(mine), surveyed(theirs))
    prompts = [{prompt_of(part, i) for i in range(len(part))} for part in (mine, theirs)]
    both = prompts[0] & prompts[1]
    assert found["prompts"] == len(both)
    assert found["rollouts"] == sum(prompt_of(mine, i) in both for i in range(len(mine)))


def test_few_distinct_numbers_are_counted():
    assert distribution(np.asarray([0, 1, 1, 0.5]))["distinct"] == {"0": 1, "0.5": 1, "1": 2}
    assert distribution(np.random.default_rng(0).normal(size=5000))["distinct"] is None
    assert distribution(np.zeros(0)) == {}


@pytest.mark.parametrize("counts", [[3], [1, 1, 1], list(range(100)), [1, 10_000]])
def test_histograms_of_counts_hold_every_one(counts):
    found = lengths_of(np.asarray(counts))
    assert sum(found["histogram"]["counts"]) == len(counts)
    assert len(found["histogram"]["counts"]) <= 21
