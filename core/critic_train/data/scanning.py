"""Rollouts in blocks whose bounds depend on nothing but the rollouts of their file.

Reading a data set to its end to see what is in it: all columns that may be there; bad rows and files passed over.
"""

from collections.abc import Callable, Iterator

import numpy as np

from critic_train.data.bad_input import ROWS_SHOWN, BadFiles
from critic_train.data.reading import RolloutReader
from critic_train.data.schema import Needs
from critic_train.data.shards import Shard
from critic_train.events import Event, Progress
from critic_train.rollouts import Rollouts, concat_rollouts
from critic_train.settings import column_renames
from critic_train.stopping import StopRequest

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
            yield concat_rollouts(held)
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
                yield concat_rollouts(held)
                held, tokens = [], 0
            start = stop
    if held:
        yield concat_rollouts(held)


EVERYTHING = Needs(returns="where there", values=False, rewards="where there", truncated="where there")


def full_reader(
    shards: list[Shard],
    column: list[str],
    stop: StopRequest,
    bad_files: BadFiles | None,
    bad_rows_kept: int = ROWS_SHOWN,
) -> RolloutReader:
    """A reader of whatever the shards have.

    Args:
        shards: from `find_shards`.
        column: the values of --column.
        stop: looked at while a file is tried.
        bad_files: takes the files that cannot be used; None makes one an error.
        bad_rows_kept: how many bad rows are kept to be named.
    """
    return RolloutReader(
        shards,
        renames=column_renames(column),
        on_bad_rows="skip",
        on_bad_file="fail" if bad_files is None else "skip",
        bad_files=bad_files,
        needs=EVERYTHING,
        bad_rows_kept=bad_rows_kept,
        stop=stop,
    )


def read_through(
    reader: RolloutReader,
    stop: StopRequest,
    use: Callable[[Rollouts], None] = lambda batch: None,
    stage: str = "reading rollouts",
) -> Iterator[Event]:
    """Read to the end, passing every batch to `use`; yields progress.

    Raises:
        Stopped: asked to stop.
    """
    total = sum(shard.num_rows for shard in reader.shards)
    for batch in reader:
        stop.check()
        use(batch)
        yield Progress(stage=stage, done=int(batch.row[-1]) + 1, total=total)
