"""The steps of `predict`: values into logs, logs and rows into files."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from critic_train.data.bad_files import BadFiles
from critic_train.data.blocks import blocks
from critic_train.data.output import OutputDirectory
from critic_train.data.reading import Needs, RolloutReader, RowLimits
from critic_train.data.shards import Shard
from critic_train.errors import ModelError
from critic_train.events import Event, Notice, Progress
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.loading import ModelSource, load_critic
from critic_train.model.predicting import predict_values
from critic_train.model.selfcheck import settle
from critic_train.predicting.columns import Filled
from critic_train.predicting.first_pass import first_pass
from critic_train.predicting.value_log import LoggedValues, ValueLog
from critic_train.predicting.whitening import Whitening
from critic_train.predicting.writing import NewColumns, written_again
from critic_train.returns.recipe import ReturnRecipe
from critic_train.rollouts import Rollouts
from critic_train.run.storage import remove
from critic_train.settings import OnBadRows, PredictSettings, column_renames
from critic_train.stopping import StopRequest


class StoppedError(Exception):
    """Somebody asked the job to stop."""


@dataclass(slots=True, kw_only=True)
class Job:
    """What all steps need."""

    settings: PredictSettings
    source: ModelSource
    compute: Compute
    output: OutputDirectory
    places: dict[str, Path]
    bad_files: BadFiles
    stop: StopRequest
    rows_left_out: dict[str, Any] | None = None

    @property
    def columns(self) -> NewColumns:
        """What is written."""
        return NewColumns(recipe=ReturnRecipe.of(self.settings), written=self.settings.written)

    def run(self, shards: list[Shard]) -> Iterator[Event]:
        """Check all files, then predict and write one after the other; with whitening, predict all of them first."""
        reader = self._reader(shards, self.settings.on_bad_rows)
        found = yield from first_pass(reader, sum(shard.num_rows for shard in shards), self.stop)
        if self.stop.requested:
            raise StoppedError
        self.rows_left_out = reader.bad_rows.summary()
        sound = [shard for shard in shards if shard.name not in self.bad_files]
        left = [shard for shard in sound if not self.output.is_written(shard.name)]
        if left:
            assert found.sample is not None, "the reader raises where no row is good"
            critic = load_critic(self.source).to(self.compute.device).eval()
            choice, said = settle(critic, found.sample, self.settings, self.compute)
            for sentence in said:
                yield Notice(message=sentence, level="warning")
            # What has no row that can be used is written with nothing filled in.
            usable = [shard for shard in sound if shard.name in found.rollouts]
            whitening: Whitening | None = None
            if self.settings.whiten_advantages:
                for shard in usable:
                    yield from self._predict(critic, shard, forest=choice.forest)
                whitening = yield from self._moments(usable)
            for shard in left:
                if shard in usable and whitening is None:
                    yield from self._predict(critic, shard, forest=choice.forest)
                yield from self._write(shard, whitening, empty=shard not in usable)
        for shard in sound:
            remove(self._log(shard))

    def _reader(self, shards: list[Shard], on_bad_rows: OnBadRows = "skip") -> RolloutReader:
        recipe, columns = ReturnRecipe.of(self.settings), self.columns
        return RolloutReader(
            shards,
            renames=column_renames(self.settings.column),
            on_bad_rows=on_bad_rows,
            on_bad_file=self.settings.on_bad_file,
            bad_files=self.bad_files,
            limits=RowLimits(vocab_size=self.source.vocab_size, max_length=self.source.max_length).at_most(
                self.settings.max_length
            ),
            needs=Needs(
                returns=False,
                values=False,
                rewards="yes" if columns.computes else "no",
                truncated=columns.computes and recipe.reads_truncated,
            ),
            stop=self.stop,
        )

    def _batches(self, shard: Shard) -> Iterator[Rollouts]:
        for batch in self._reader([shard]):
            if self.stop.requested:
                raise StoppedError
            yield batch
        if self.stop.requested:
            raise StoppedError

    def _predict(self, critic: Critic, shard: Shard, *, forest: bool) -> Iterator[Event]:
        """Have all values of a file in its log."""
        with ValueLog(self._log(shard)) as log:
            for block in blocks(self._reader([shard])):
                if self.stop.requested:
                    raise StoppedError
                if not log.has(int(block.response_mask.sum())):
                    values = predict_values(critic, block, self.compute, forest=forest, stop=self.stop)
                    if values is None:
                        raise StoppedError
                    if not np.isfinite(values).all():
                        raise ModelError(
                            f"{self.settings.model} predicts NaN or infinite values on {shard.name}",
                            hint="--precision fp32 may help; a run that diverged has earlier checkpoints",
                        )
                    log.append(values[block.response_mask])
                    if sentence := self.compute.lowered():
                        yield Notice(message=sentence, level="warning")
                yield Progress(stage=f"predicting {shard.name}", done=int(block.row[-1]) + 1, total=shard.num_rows)
        if self.stop.requested:
            raise StoppedError

    def _log(self, shard: Shard) -> Path:
        """Where a file's values are kept until it stands."""
        return self.output.work / self.places[shard.name].relative_to(self.output.path).with_suffix(".values")

    def _moments(self, shards: list[Shard]) -> Generator[Event, None, Whitening]:
        """Mean and variance of all advantages."""
        whitening = Whitening()
        for done, shard in enumerate(shards):
            with LoggedValues(self._log(shard)) as log:
                for batch in self._batches(shard):
                    whitening.add(self.columns.advantages(batch, log.over(batch.response_mask)))
            yield Progress(stage="whitening", done=done + 1, total=len(shards), unit="files")
        return whitening

    def _write(self, shard: Shard, whitening: Whitening | None, *, empty: bool) -> Iterator[Event]:
        """Write a file from its log."""
        filled = iter(()) if empty else self._filled(shard, whitening)
        renames, place = column_renames(self.settings.column), self.places[shard.name]
        for row in written_again(shard, place, self.columns, renames, filled, self.stop):
            yield Progress(stage=f"writing {place}", done=row, total=shard.num_rows)
        if whitening is None:
            remove(self._log(shard))

    def _filled(self, shard: Shard, whitening: Whitening | None) -> Iterator[Filled]:
        with LoggedValues(self._log(shard)) as log:
            for batch in self._batches(shard):
                yield self.columns.of(batch, log.over(batch.response_mask), whitening)

    def result(self, status: str, shards: list[Shard], part: tuple[int, int]) -> dict[str, Any]:
        """What `--json` prints."""
        done = [shard for shard in shards if self.output.is_written(shard.name)]
        return {
            "status": status,
            "to": str(self.output.path),
            "model": self.settings.model,
            "columns": list(self.settings.written),
            "part": f"{part[0]}/{part[1]}",
            "files": len(done),
            "files_in_all": len(shards),
            "rows": sum(shard.num_rows for shard in done),
            "rows_left_out": self.rows_left_out,
            "files_left_out": self.bad_files.summary(),
        }
