"""What commands do before the model runs: resolve what --model names, and read and check every row once."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from critic_train.data.reading import RolloutReader
from critic_train.data.row_checks import RowLimits
from critic_train.distributed.ranks import Ranks
from critic_train.errors import ConfigError, ModelError
from critic_train.events import Event, Notice, Progress
from critic_train.model.loading import ModelSource, read_model
from critic_train.model.selfcheck import SAMPLED_ROLLOUTS
from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import resolve_model
from critic_train.settings import ModelSettings
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


def limits_of(sources: Sequence[ModelSource]) -> RowLimits:
    """Which rows all of some models can read."""
    lengths = [source.max_length for source in sources if source.max_length is not None]
    return RowLimits(
        vocab_size=min((source.vocab_size for source in sources), default=None),
        max_length=min(lengths, default=None),
        placeholder_ids=tuple({placeholder for source in sources for placeholder in source.placeholder_ids}),
    )


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


def read_base_model(model: ModelSettings, out: Path, ranks: Ranks) -> ModelSource | None:
    """What --model names, None without it; rank 0 resolves a run to its best checkpoint. All ranks call it."""
    if model.model is None:
        return None
    path = ""
    if ranks.is_main:
        if Path(model.model).resolve() == out.resolve():
            raise ConfigError(f"--model and --out are both {model.model}", hint="give the new run an --out of its own")
        path = str(resolve_model(Path(model.model)))
    return read_model(Path(ranks.broadcast(path)), new_head=model.head_init is not None)
