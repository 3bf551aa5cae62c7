"""Rollouts in blocks whose bounds depend on nothing but the rollouts of their file."""

from collections.abc import Iterator

import numpy as np

from critic_train.data.reading import RolloutReader
from critic_train.rollouts import Rollouts, joined

BLOCK_TOKENS = 2**18


def blocks(reader: RolloutReader, most_tokens: int = BLOCK_TOKENS) -> Iterator[Rollouts]:
    """A reader's rollouts in its order, as many at once as `most_tokens` allow, never of two files.

    How the reader batches rows depends on which columns it decodes. What a model computes depends, in its last bits, on
    what is computed together. So `eval` and `predict` both cut their rollouts here: they compute the same values to
    the bit, and a job that was stopped finds its bounds again.

    Args:
        reader: of one file or several.
        most_tokens: tokens of a block; a longer rollout has a block of its own.
    """
    held: list[Rollouts] = []
    tokens = file = 0
    for batch in reader:
        if held and len(reader.files_read) != file:
            yield joined(held)
            held, tokens = [], 0
        file = len(reader.files_read)
        start = 0
        while start < len(batch):
            last_token = batch.offsets[start] + most_tokens - tokens
            stop = max(start, int(np.searchsorted(batch.offsets, last_token, side="right")) - 1)
            if stop == start and not held:
                stop += 1
            if stop > start:
                held.append(batch.take(np.arange(start, stop)))
                tokens += int(batch.offsets[stop] - batch.offsets[start])
            if stop < len(batch):
                yield joined(held)
                held, tokens = [], 0
            start = stop
    if held:
        yield joined(held)
