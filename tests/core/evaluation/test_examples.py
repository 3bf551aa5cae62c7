"""Which rollouts are kept for reading, told from the rules by hand."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import branching_rollouts, readable_rollouts

from critic_train.evaluation.examples import COUNTS, PROMPT_TOKENS, RESPONSE_TOKENS, Examples


def kept(rollouts, values, batches, seed=0):
    """Records after taking rollouts in, batch by batch; `batches` are arrays of places."""
    examples = Examples(seed=seed)
    for index in batches:
        part = rollouts.take(index)
        tokens = np.concatenate([np.arange(rollouts.offsets[i], rollouts.offsets[i + 1]) for i in index])
        examples.add(part, {name: column[tokens] for name, column in values.items()})
    return examples.records()


@pytest.fixture(scope="module")
def many():
    rollouts = readable_rollouts(30, seed=4)
    draw = np.random.default_rng(1)
    values = (rollouts.returns + draw.normal(0, 0.4, len(rollouts.returns))).astype(np.float32)
    return rollouts, values


def test_the_worst_the_best_and_those_that_move_most_are_kept(many):
    rollouts, values = many
    errors, swings = [], []
    for start, stop in zip(rollouts.offsets[:-1], rollouts.offsets[1:], strict=True):
        mask = rollouts.response_mask[start:stop]
        v, g = values[start:stop][mask].astype(float), rollouts.returns[start:stop][mask].astype(float)
        errors.append(((v - g) ** 2).mean())
        swings.append(v.max() - v.min())
    records = kept(rollouts, {"c": values}, [np.arange(len(rollouts))])
    rows = {why: [r["row"] for r in records if r["why"] == why] for why in COUNTS}
    worst = np.argsort(errors)[::-1][: COUNTS["worst"]].tolist()
    best = np.argsort(errors)[: COUNTS["best"]].tolist()
    assert rows["worst"] == worst
    assert rows["best"] == best
    moving = [i for i in np.argsort(swings)[::-1][: COUNTS["swing"]].tolist() if i not in {*worst, *best}]
    assert rows["swing"] == moving
    assert len({r["row"] for r in records}) == len(records) <= sum(COUNTS.values())


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_neither_order_nor_batches_matter(many, seed, size):
    rollouts, values = many
    order = np.random.default_rng(seed).permutation(len(rollouts))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    assert kept(rollouts, {"c": values}, batches) == kept(rollouts, {"c": values}, [np.arange(len(rollouts))])


def test_the_draw_follows_the_seed_and_looks_at_no_value(many):
    rollouts, values = many
    whole = [np.arange(len(rollouts))]

    def drawn(column, seed):
        return {r["row"] for r in kept(rollouts, {"c": column}, whole, seed) if r["why"] == "drawn"}

    others = {r["row"] for r in kept(rollouts, {"c": -values}, whole, 3)} | {
        r["row"] for r in kept(rollouts, {"c": values}, whole, 3)
    }
    assert drawn(values, 3) <= others
    assert drawn(values, 3) != drawn(values, 4)


def test_what_is_kept_of_a_rollout():
    rollouts = branching_rollouts()
    values = np.arange(len(rollouts.returns), dtype=np.float32) / 7
    [first, *_] = records = kept(rollouts, {"c": values}, [np.arange(len(rollouts))])
    assert json.loads(json.dumps(records)) == records
    i = first["row"]
    part = slice(rollouts.offsets[i], rollouts.offsets[i + 1])
    assert first["input_ids"] == rollouts.input_ids[part].tolist()
    assert first["response_mask"] == rollouts.response_mask[part].tolist()
    assert first["values"] == pytest.approx(values[part].tolist(), rel=1e-5)
    assert first["old_values"] == pytest.approx(rollouts.values[part].tolist(), rel=1e-5)
    mask = rollouts.response_mask[part]
    assert first["mean_return"] == pytest.approx(rollouts.returns[part][mask].astype(float).mean(), abs=1e-12)
    assert (first["tokens"], first["shown_from"]) == (part.stop - part.start, 0)


def test_a_long_rollout_is_cut_on_both_sides():
    rollouts = readable_rollouts(1, responses=1)
    prompt, response = PROMPT_TOKENS + 50, RESPONSE_TOKENS + 70
    total = prompt + response
    long = rollouts.__class__(
        input_ids=np.arange(total, dtype=np.int32),
        offsets=np.array([0, total]),
        response_mask=np.arange(total) >= prompt,
        returns=np.ones(total, np.float32),
        values=None,
        group=np.zeros(1, np.int64),
        row=np.zeros(1, np.int64),
    )
    [example] = kept(long, {"c": np.zeros(total, np.float32)}, [np.array([0])])
    assert example["shown_from"] == 50
    assert example["input_ids"] == list(range(50, prompt + RESPONSE_TOKENS))
    assert example["tokens"] == total
    assert "old_values" not in example


def test_rollouts_without_response_are_never_shown():
    rollouts = readable_rollouts(2)
    rollouts.response_mask[:] = False
    assert kept(rollouts, {"c": rollouts.returns}, [np.arange(len(rollouts))]) == []


def test_uids_are_looked_up_for_what_is_kept_only(many):
    rollouts, values = many
    asked = []

    def uids(rows):
        asked.append(list(rows))
        return {row: f"u{row}" for row in rows}

    examples = Examples(uids=uids)
    examples.add(rollouts, {"c": values})
    records = examples.records()
    assert asked == [[r["row"] for r in records]]
    assert all(r["uid"] == f"u{r['row']}" for r in records)
