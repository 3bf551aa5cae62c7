"""Columns set aside come back as they were, from memory or disk, and memory stays flat over tokens."""

import tracemalloc
from functools import partial

import numpy as np
import pytest

from critic_train.errors import MachineError
from critic_train.evaluation import accumulate as evidence
from critic_train.evaluation import token_columns as spool
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.token_columns import RankCorrelation, TokenStore, block_slices
from critic_train.rollouts import Rollouts


@pytest.mark.parametrize("memory_bytes", [10, 10**6])
def test_columns_come_back_in_blocks_of_whole_rollouts(monkeypatch, memory_bytes):
    monkeypatch.setattr(spool, "BLOCK_TOKENS", 50)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 40)
    lengths[7] = 200  # longer than a block
    tokens = rng.normal(size=lengths.sum()).astype(np.float32)
    kept = TokenStore(["a", "b"], memory_bytes=memory_bytes)
    for part in np.split(np.arange(len(tokens)), [3, 3, 400]):
        kept.append("a", tokens[part])
        kept.append("b", -tokens[part])
        next(kept.blocks("a", np.array([1])))  # reading does not disturb what is added next
    blocks = list(kept.blocks("a", lengths))
    assert [len(b) for b in blocks] == [lengths[part].sum() for part in block_slices(lengths)]
    assert max(len(b) for b in blocks) == 200
    assert sorted(len(b) for b in blocks)[-2] <= 50
    assert (np.concatenate(blocks) == tokens).all()
    for a, b in zip(kept.blocks("a", lengths), kept.blocks("b", lengths), strict=True):
        assert (a == -b).all()


def test_a_full_disk_is_said_plainly(monkeypatch):
    kept = TokenStore(["a"])

    class Full:
        def seek(self, *_):
            return 0

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(kept._files, "a", Full())
    with pytest.raises(MachineError, match="No space left on device") as caught:
        kept.append("a", np.zeros(3, dtype=np.float32))
    assert "TMPDIR" in caught.value.hint


def test_memory_grows_with_rollouts_not_with_tokens(monkeypatch):
    monkeypatch.setattr(evidence, "TokenStore", partial(TokenStore, memory_bytes=1000))

    def growth(tokens):
        """Bytes that ten more batches of 100 rollouts leave behind."""
        offsets = np.arange(101, dtype=np.int64) * (tokens + 1)
        returns = np.random.default_rng(0).random(int(offsets[-1]), dtype=np.float32)
        mask = np.ones(len(returns), dtype=bool)
        mask[offsets[:-1]] = False
        batch = Rollouts(
            input_ids=np.zeros(len(returns), dtype=np.int32),
            offsets=offsets,
            response_mask=mask,
            returns=returns,
            values=returns,
            group=np.arange(100) // 8,
            row=np.arange(100),
        )
        judge = Judge(["c"])
        judge.add(batch, {"c": returns})
        tracemalloc.start()
        for _ in range(10):
            judge.add(batch, {"c": returns})
        left = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return left

    assert growth(10) / 1000 < 150  # bytes a rollout
    assert growth(1000) < 1.5 * growth(10)  # a hundred times the tokens


def test_memory_of_a_verdict_does_not_grow_with_tokens(monkeypatch):
    monkeypatch.setattr(evidence, "TokenStore", partial(TokenStore, memory_bytes=1000))
    monkeypatch.setattr(evidence, "RankCorrelation", partial(RankCorrelation, exact_tokens=0, bins=2**12))
    monkeypatch.setattr(spool, "BLOCK_TOKENS", 2**12)

    def peak(tokens):
        """Most bytes that a verdict on 400 rollouts takes."""
        offsets = np.arange(401, dtype=np.int64) * (tokens + 1)
        draw = np.random.default_rng(0)
        returns = np.repeat(draw.integers(0, 2, 400), tokens + 1).astype(np.float32)
        mask = np.ones(len(returns), dtype=bool)
        mask[offsets[:-1]] = False
        batch = Rollouts(
            input_ids=np.zeros(len(returns), dtype=np.int32),
            offsets=offsets,
            response_mask=mask,
            returns=returns,
            values=draw.random(len(returns), dtype=np.float32),
            group=np.arange(400) // 8,
            row=np.arange(400),
            rewards=np.where(np.roll(mask, -1), 0, returns).astype(np.float32),
        )
        judge = Judge(["c"], resamples=20)
        judge.add(batch, {"c": draw.random(len(returns), dtype=np.float32)})
        del batch, returns, mask
        tracemalloc.start()
        judge.verdict()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(2000) < 1.1 * peak(20)  # a hundred times the tokens
