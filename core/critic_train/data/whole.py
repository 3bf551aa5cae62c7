"""Reading a data set to its end to see what is in it: all columns that may be there; bad rows and files passed over."""

from collections.abc import Callable, Iterator

from critic_train.data.bad_files import BadFiles
from critic_train.data.bad_rows import SHOWN
from critic_train.data.columns import Needs
from critic_train.data.reading import RolloutReader
from critic_train.data.shards import Shard
from critic_train.events import Event, Progress
from critic_train.rollouts import Rollouts
from critic_train.settings import column_renames
from critic_train.stopping import StopRequest

EVERYTHING = Needs(returns="where there", values=False, rewards="where there", truncated="where there")


def whole_reader(
    shards: list[Shard], column: list[str], stop: StopRequest, bad_files: BadFiles | None, bad_rows_kept: int = SHOWN
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
    """Read to the end, or until asked to stop, telling how far it is; `use` is given every batch."""
    total = sum(shard.num_rows for shard in reader.shards)
    for batch in reader:
        if stop.requested:
            break
        use(batch)
        yield Progress(stage=stage, done=int(batch.row[-1]) + 1, total=total)
