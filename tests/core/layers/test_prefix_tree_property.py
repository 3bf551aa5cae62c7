"""However a mini-batch is cut and laid out, every response token is asked once, at the state before it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import rollouts_of

from critic_train.model.compute import Compute
from critic_train.model.microbatches import micro_batches
from critic_train.rollouts import Rollouts


def any_rollouts(lists: list[list[int]], prompts: list[int]) -> Rollouts:
    kept = [ids for ids in lists if len(ids) > 1]
    lengths = [1 + prompt % (len(ids) - 1) for ids, prompt in zip(kept, prompts, strict=False)]
    return rollouts_of([np.asarray(ids, dtype=np.int32) for ids in kept], lengths, gaps=True)


@pytest.mark.parametrize("forest", [True, False])
@settings(max_examples=60)
@given(
    lists=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=12), min_size=1, max_size=12),
    prompts=st.lists(st.integers(0, 10), min_size=12, max_size=12),
    max_tokens=st.integers(1, 60),
)
def test_every_token_is_asked_once(forest: bool, lists: list[list[int]], prompts: list[int], max_tokens: int) -> None:
    rollouts = any_rollouts(lists, prompts)
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=max_tokens)
    asked: list[int] = []
    for batch in micro_batches(rollouts, compute, forest=forest):
        ids = batch.trunk_arguments["input_ids"].reshape(-1).numpy()
        assert len(ids) == batch.computed_tokens
        owners = np.searchsorted(rollouts.offsets, batch.response_tokens, side="right") - 1
        assert batch.computed_tokens <= max_tokens or len(np.unique(owners)) == 1
        # The state that chooses a token stands where the token before it does.
        states = batch.read_positions.numpy()[batch.value_index.numpy()]
        np.testing.assert_array_equal(ids[states], rollouts.input_ids[batch.response_tokens - 1])
        if forest:
            depth = batch.trunk_arguments["position_ids"].reshape(-1).numpy()
            np.testing.assert_array_equal(depth[states], batch.response_tokens - 1 - rollouts.offsets[owners])
        asked += batch.response_tokens.tolist()
    assert sorted(asked) == np.flatnonzero(rollouts.response_mask).tolist()
