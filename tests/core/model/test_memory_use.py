"""What a position holds, by the peaks of passes; CUDA's memory is a model of its own here."""

import pytest
import torch
from support import small_config

from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.model import memory_use
from critic_train.model.compute import Compute
from critic_train.model.memory_use import MemoryUse, measure_further, measure_memory
from critic_train.weights.loading import build_critic

COMPUTE = Compute(device=torch.device("cuda", 0), precision="bf16", max_tokens=10**6)
FIXED, FORWARD, BACKWARD, CASTS = 123_456, 789.0, 1000.0, 2_110_000
"""Bytes; with 10,000 positions and more the backward pass holds the most."""


@pytest.fixture
def passes(monkeypatch):
    """Positions of every pass."""
    seen = []

    def peak(critic, compute, rollouts, *, forest, training):
        positions = len(build_tree_layout(rollouts, prefix_order(rollouts)))
        seen.append(positions)
        return positions, int(FIXED + max(CASTS + FORWARD * positions, BACKWARD * positions))

    monkeypatch.setattr(memory_use, "peak", peak)
    monkeypatch.setattr(memory_use, "release_memory", lambda device: None)
    return seen


def critic():
    return build_critic(small_config("Llama"), seed=0)


def test_two_peaks_give_what_a_token_and_the_rest_hold(passes):
    use = measure_memory(critic(), COMPUTE, forest=True, training=True)
    assert (use.per_token, use.fixed) == (FORWARD, FIXED + CASTS)
    assert passes == [1024, 1024, 3072]
    assert use.tokens(FIXED + CASTS + 789 * 50) == 50
    assert MemoryUse(fixed=100, per_token=1.0).tokens(50) == 0


def test_a_further_pass_gives_what_many_positions_hold(passes):
    use = measure_memory(critic(), COMPUTE, forest=True, training=True)
    further = measure_further(critic(), COMPUTE, use, 40_000, forest=True)
    assert passes[3:] == [1024, 40_000]
    for positions, expected in {3072: CASTS + FORWARD * 3072, 40_000: BACKWARD * 40_000}.items():
        assert further.fixed + further.per_token * positions == pytest.approx(FIXED + expected)
    assert further.fixed + further.per_token * 53_333 == pytest.approx(FIXED + BACKWARD * 53_333, rel=0.02)
    assert measure_further(critic(), COMPUTE, use, 6000, forest=True) is use
