"""`critic-train split`: read the prompt groups, hold some out, write the rows of each side."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.bad_input import BadFiles
from critic_train.data.copying import OutputDirectory, copy_shard, needs_of_fit, schema_of, target_paths
from critic_train.data.labels import prompt_keys
from critic_train.data.order import connected_groups, split_groups
from critic_train.data.reading import Needs, RolloutReader, RowLimits
from critic_train.data.shards import Shard, find_shards, fingerprint
from critic_train.errors import DataError
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.settings import FitSettings, SplitSettings, as_dict, column_renames
from critic_train.settings.command_lines import next_command
from critic_train.stopping import Stopped, StopRequest

TRAIN, VAL = "train", "val"


def split(settings: SplitSettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Write shards twice: the rows to train on, and those of held-out prompt groups.

    The groups held out are those that `fit --val-fraction --seed` holds out of the same rollouts. Rows keep their
    order, files their names and every column; a file without rows of a side is not written there. Memory holds 24
    bytes a rollout and one row group.

    Args:
        settings: what to split, and how.
        stop: checked between batches of rows.

    Yields:
        Progress and notices; RunEnded last.

    Raises:
        CriticTrainError: an error that the user can fix.
    """
    stop = stop or StopRequest()
    bad_files = BadFiles()
    shards = find_shards(settings.reading.data, bad_files)
    to = Path(settings.output.to or "")
    sides = {side: target_paths(shards, settings.reading.data, to / side) for side in (TRAIN, VAL)}
    files = {f"{side}/{name}": path for side, targets in sides.items() for name, path in targets.items()}
    recorded = {name: value for name, value in as_dict(settings).items() if name != "to"}
    if recorded["group_by"] is None:
        del recorded["group_by"]  # which earlier versions did not record
    with OutputDirectory(to, "split", files) as output:
        output.compare({"settings": recorded, "data": fingerprint(shards)})
        reader = RolloutReader(
            shards,
            renames=column_renames(settings.reading.column),
            on_bad_rows=settings.reading.on_bad_rows,
            on_bad_file=settings.reading.on_bad_file,
            bad_files=bad_files,
            limits=RowLimits().at_most(settings.reading.max_length),
            needs=Needs(returns=False, values=False),
            group_by=settings.reading.group_by,
            stop=stop,
        )
        try:
            keys = yield from _keys(reader, sum(shard.num_rows for shard in shards), stop)
            held = keys.held_out(settings.output.val_fraction, settings.output.seed)
            by_name = {shard.name: shard for shard in shards}
            first_row = 0
            for name, rows in reader.files_read:
                for side, chosen in ((TRAIN, keys.usable & ~held), (VAL, held)):
                    mine = chosen[first_row : first_row + rows]
                    if mine.any() and not output.is_written(f"{side}/{name}"):
                        yield from _write(by_name[name], sides[side][name], mine, stop)
                first_row += rows
        except Stopped:
            yield RunEnded(status="interrupted", signal_number=stop.signal_number, result={"to": settings.output.to})
            return
        output.clear()
        for sentence in reader.notices:
            yield Notice(message=sentence)
        left_out = {"rows_left_out": reader.bad_rows.summary(), "files_left_out": bad_files.summary()}
        first = [by_name[name] for name, _ in reader.files_read]
        result = {"to": settings.output.to, **keys.counts(held), **left_out, "next": _next(settings, first)}
        yield RunEnded(status="finished", result=result)


def _next(settings: SplitSettings, shards: list[Shard]) -> str:
    """The command that trains on one side and judges on the other."""
    to = str(settings.output.to).rstrip("/")
    needs = needs_of_fit(shards, column_renames(settings.reading.column))
    sides = {"data": [f"{to}/{TRAIN}"], "val_data": [f"{to}/{VAL}"]}
    return next_command(FitSettings, settings, ["group_by"], **sides, **needs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keys:
    """Keys of every row of the files read, n in all.

    Attributes:
        usable: bool [n].
        groups: int64 [n], prompt group keys of usable rows.
        prompts: int64 [n], keys of their prompts' tokens.
    """

    usable: NDArray[np.bool_]
    groups: NDArray[np.int64]
    prompts: NDArray[np.int64]

    def held_out(self, fraction: float, seed: int) -> NDArray[np.bool_]:
        """bool [n]: the rows held out."""
        at = np.flatnonzero(self.usable)
        _, held = split_groups(connected_groups(self.groups[at], self.prompts[at]), fraction, seed)
        if not len(held):
            raise DataError(
                "all rollouts have one prompt group, or share a prompt: there is nothing to hold out",
                hint="--column uid=NAME names the column of prompt groups",
            )
        chosen = np.zeros_like(self.usable)
        chosen[at[held]] = True
        return chosen

    def counts(self, held: NDArray[np.bool_]) -> dict[str, dict[str, int]]:
        """Rollouts and prompt groups of each side."""
        return {
            side: {"rollouts": int(rows.sum()), "prompt_groups": len(np.unique(self.groups[rows]))}
            for side, rows in ((TRAIN, self.usable & ~held), (VAL, held))
        }


def _keys(reader: RolloutReader, total: int, stop: StopRequest) -> Generator[Event, None, _Keys]:
    """Read every row's keys."""
    usable = np.zeros(total, dtype=np.bool_)
    groups, prompts = np.zeros((2, total), dtype=np.int64)
    for batch in reader:
        stop.check()
        usable[batch.row] = True
        groups[batch.row] = batch.group
        prompts[batch.row] = prompt_keys(batch)
        yield Progress(stage="reading prompts", done=int(batch.row[-1]) + 1, total=total)
    stop.check()
    return _Keys(usable=usable, groups=groups, prompts=prompts)


def _write(shard: Shard, target: Path, chosen: NDArray[np.bool_], stop: StopRequest) -> Iterator[Event]:
    """Write the chosen rows of a file."""

    def change(first_row: int, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch.filter(pa.array(chosen[first_row : first_row + batch.num_rows]))

    for row in copy_shard(shard, target, schema_of(shard), change, stop):
        yield Progress(stage=f"writing {target}", done=row, total=shard.num_rows)
