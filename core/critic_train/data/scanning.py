"""Reading a data set to its end: once to check it, in blocks of reproducible bounds, or with all its columns."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import numpy as np

from critic_train.data.bad_input import ROWS_SHOWN, BadFiles
from critic_train.data.reading import RolloutReader
from critic_train.data.schema import Needs
from critic_train.data.shards import Shard
from critic_train.events import Event, Notice, Progress
from critic_train.rollouts import Rollouts, concat_rollouts
from critic_train.settings import column_renames
from critic_train.stopping import StopRequest

BLOCK_TOKENS = 2**18


def blocks(reader: RolloutReader, most_tokens: int = BLOCK_TOKENS) -> Iterator[Rollouts]:
    """A reader's rollouts in its order, as many at once as `most_tokens` allow, never of two files.

    The bounds depend on nothing but the rollouts of a file; the reader's own batches depend on the columns it decodes,
    and a model's values depend, in their last bits, on what is computed together. So `eval` and `predict` compute the
    same values to the bit, and a resumed job has the same blocks as before.

    Args:
        reader: of one file or several.
        most_tokens: tokens of a block; a longer rollout has a block of its own.
    """
    pending: list[Rollouts] = []
    tokens = file = 0
    for batch in reader:
        if pending and len(reader.files_read) != file:
            yield concat_rollouts(pending)
            pending, tokens = [], 0
        file = len(reader.files_read)
        start = 0
        while start < len(batch):
            last_token = batch.offsets[start] + most_tokens - tokens
            stop = max(start, int(np.searchsorted(batch.offsets, last_token, side="right")) - 1)
            if stop == start and not pending:
                stop += 1
            if stop > start:
                pending.append(batch.take(np.arange(start, stop)))
                tokens += int(batch.offsets[stop] - batch.offsets[start])
            if stop < len(batch):
                yield concat_rollouts(pending)
                pending, tokens = [], 0
            start = stop
    if pending:
        yield concat_rollouts(pending)


EVERYTHING = Needs(
    returns="where there", values=False, rewards="where there", truncated="where there", every_rename=True
)


def full_reader(
    shards: list[Shard],
    column: list[str],
    stop: StopRequest,
    bad_files: BadFiles | None,
    listed_bad_rows: int = ROWS_SHOWN,
    group_by: str | None = None,
) -> RolloutReader:
    """A reader of whatever the shards have.

    Args:
        shards: from `find_shards`.
        column: the values of --column.
        stop: checked while a file is tried.
        bad_files: takes the files that cannot be used; None makes one an error.
        listed_bad_rows: how many bad rows are listed one by one.
        group_by: --group-by.
    """
    return RolloutReader(
        shards,
        renames=column_renames(column),
        on_bad_rows="skip",
        on_bad_file="fail" if bad_files is None else "skip",
        bad_files=bad_files,
        needs=EVERYTHING,
        listed_bad_rows=listed_bad_rows,
        group_by=group_by,
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


SAMPLED_ROLLOUTS = 4
"""Rollouts in a row of a sample, so that some share a prompt."""


@dataclass(slots=True, kw_only=True)
class FirstPass:
    """What a pass over all rows gives.

    Attributes:
        has_values: whether the shards store values.
        sample: the batch with the longest rollout, cut down to it and the first few; None where there was none.
        tokens: of all rows that can be used.
        rollouts: file name -> rows that can be used; files without any are not in it.
    """

    has_values: bool = True
    sample: Rollouts | None = None
    tokens: int = 0
    rollouts: dict[str, int] = field(default_factory=dict)


def first_pass(reader: RolloutReader, total: int, stop: StopRequest) -> Generator[Event, None, FirstPass]:
    """Read and check every row once.

    Args:
        reader: of the shards.
        total: rows in them.
        stop: checked between batches.

    Yields:
        Progress and notices.

    Raises:
        DataError: files or rows are bad.
        Stopped: the job was asked to stop.
    """
    result = FirstPass()
    for batch in reader:
        stop.check_on_all_ranks()
        result.has_values = result.has_values and batch.values is not None
        file, _ = reader.files_read[-1]
        result.rollouts[file] = result.rollouts.get(file, 0) + len(batch)
        result.tokens += len(batch.input_ids)
        longest = int(batch.lengths.argmax())
        if result.sample is None or batch.lengths[longest] > result.sample.lengths.max():
            result.sample = batch.take(np.append(np.arange(min(SAMPLED_ROLLOUTS, len(batch))), longest))
        yield Progress(stage="checking rows", done=int(batch.row[-1]) + 1, total=total)
    stop.check()
    if reader.truncated_left_out:
        yield Notice(message=f"{reader.truncated_left_out} cut rollouts are left out (--truncated drop)")
    for sentence in reader.notices:
        yield Notice(message=sentence)
    if reader.bad_files:
        yield Notice(message=reader.bad_files.sentence(), level="warning")
    return result
