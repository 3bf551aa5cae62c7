"""What `eval` and `predict` do before the model runs: resolve the critic, and read and check every row once."""

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from critic_train.data.reading import RolloutReader
from critic_train.errors import ModelError
from critic_train.events import Event, Notice, Progress
from critic_train.model.loading import ModelSource, read_model
from critic_train.model.selfcheck import SAMPLED_ROLLOUTS
from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import resolve_model
from critic_train.stopping import StopRequest


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


def critic_source(path: Path) -> ModelSource:
    """A run, a checkpoint or a directory as a critic that can be loaded.

    Raises:
        ModelError: it cannot be read, or it has no value head.
    """
    source = read_model(resolve_model(path))
    if source.head is None:
        raise ModelError(
            f"{path} has no value head: it predicts no values",
            hint=f"critic-train fit --model {path} --data ... makes a critic of it",
        )
    return source
