"""`critic-train predict`: check all rows, predict values, write each shard again with the new columns.

Predicted values go to one log a file first, so that a resumed job computes no value twice. Several processes may share
one data set; each takes every N-th file.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.data.bad_input import BadFiles
from critic_train.data.copying import OutputDirectory, needs_of_fit, target_paths
from critic_train.data.reading import Needs, RolloutReader
from critic_train.data.returns import ReturnRecipe
from critic_train.data.scanning import blocks, first_pass
from critic_train.data.shards import Shard, find_shards, fingerprint
from critic_train.errors import ConfigError, ModelError
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.model.automatic import choose_tokens
from critic_train.model.compute import Compute, resolve_device, resolve_precision
from critic_train.model.critic import Critic
from critic_train.model.microbatches import predict_with_progress
from critic_train.model.selfcheck import select_packing
from critic_train.predict.fused_values import FusedValues
from critic_train.predict.value_columns import ColumnBatch, NewColumns, Whitening, rewrite_with_columns
from critic_train.predict.value_log import LoggedValues, ValueLog
from critic_train.rollouts import Rollouts
from critic_train.run.manifest import model_digest, versions
from critic_train.run.storage import remove
from critic_train.settings import (
    CPU_MAX_TOKENS,
    FitSettings,
    OnBadRows,
    PredictSettings,
    as_dict,
    column_renames,
    part_of,
)
from critic_train.settings.command_lines import COMPUTE, READING, next_command
from critic_train.stopping import Stopped, StopRequest
from critic_train.weights.first_pass import critic_source, limits_of
from critic_train.weights.loading import ModelSource, load_critic


def part_of_this_process(settings: PredictSettings) -> tuple[int, int]:
    """(K, N) of `--part`, else of torchrun's RANK and WORLD_SIZE, else (1, 1).

    Raises:
        ConfigError: whitening or the fused baseline was asked for, which need all files in one process.
    """
    named = part_of(settings.prediction.part) if settings.prediction.part else None
    part = named or (int(os.environ.get("RANK", "0")) + 1, int(os.environ.get("WORLD_SIZE", "1")))
    if settings.prediction.whiten_advantages and part[1] > 1:
        raise ConfigError(
            f"--whiten-advantages needs all files in one process, and this is part {part[0]} of {part[1]}",
            hint="write the advantages as they are; whiten where they are used, over each batch",
        )
    if settings.prediction.baseline == "fused" and part[1] > 1:
        raise ConfigError(
            f"--baseline fused needs all files in one process, and this is part {part[0]} of {part[1]}",
            hint="write the critic's values in parts, then fuse them in one process",
        )
    return part


def device_of(name: str) -> str:
    """`auto` under torchrun -> this process's own GPU; any other name as it is."""
    local = os.environ.get("LOCAL_RANK")
    if name == "auto" and local is not None and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return name


@dataclass(slots=True, kw_only=True)
class Job:
    """The state that all steps of one process share."""

    settings: PredictSettings
    source: ModelSource
    compute: Compute
    output: OutputDirectory
    targets: dict[str, Path]
    bad_files: BadFiles
    stop: StopRequest
    rows_left_out: dict[str, Any] | None = None
    fused: FusedValues | None = None

    @property
    def needs_everything(self) -> bool:
        """Whether what is written of a rollout depends on the rollouts of all files."""
        return self.settings.prediction.whiten_advantages or self.settings.prediction.baseline == "fused"

    @property
    def columns(self) -> NewColumns:
        """Computes the columns that are written."""
        return NewColumns(recipe=ReturnRecipe.of(self.settings.returns), written=self.settings.written)

    def run(self, shards: list[Shard]) -> Iterator[Event]:
        """Check all files, then predict and write one after the other; predict all first where one needs the others."""
        reader = self._reader(shards, self.settings.reading.on_bad_rows)
        checked = yield from first_pass(reader, sum(shard.num_rows for shard in shards), self.stop)
        self.stop.check()
        self.rows_left_out = reader.bad_rows.summary()
        sound = [shard for shard in shards if shard.name not in self.bad_files]
        left = [shard for shard in sound if not self.output.is_written(shard.name)]
        if left:
            assert checked.sample is not None, "the reader raises where no row is good"
            yield from self.source.notices
            critic = load_critic(self.source).to(self.compute.device).eval()
            choice, notices = select_packing(
                critic, checked.sample, self.settings.compute, self.compute, tokens=checked.tokens
            )
            for sentence in notices:
                yield Notice(message=sentence, level="warning")
            if self.settings.compute.max_tokens is None:
                choose_tokens(critic, self.compute, forest=choice.forest, largest=checked.sample)
            # Files without a usable row are written with nulls.
            usable = [shard for shard in sound if shard.name in checked.rollouts]
            whitening: Whitening | None = None
            if self.needs_everything:
                for shard in usable:
                    yield from self._predict(critic, shard, forest=choice.forest)
            if self.settings.prediction.baseline == "fused":
                self.fused = yield from self._fuse(usable)
            if self.settings.prediction.whiten_advantages:
                whitening = yield from self._moments(usable)
            for shard in left:
                if shard in usable and not self.needs_everything:
                    yield from self._predict(critic, shard, forest=choice.forest)
                yield from self._write(shard, whitening, empty=shard not in usable)
        for shard in sound:
            remove(self._log(shard.name))

    def _reader(self, shards: list[Shard], on_bad_rows: OnBadRows = "skip") -> RolloutReader:
        recipe, columns = ReturnRecipe.of(self.settings.returns), self.columns
        fuses = self.settings.prediction.baseline == "fused"
        return RolloutReader(
            shards,
            renames=column_renames(self.settings.reading.column),
            on_bad_rows=on_bad_rows,
            on_bad_file=self.settings.reading.on_bad_file,
            group_by=self.settings.reading.group_by,
            bad_files=self.bad_files,
            limits=limits_of([self.source]).at_most(self.settings.reading.max_length),
            needs=Needs(
                returns=fuses and not recipe.from_rewards,
                values=False,
                rewards="yes" if columns.computes else "where there" if fuses else "no",
                truncated=columns.computes and recipe.reads_truncated,
            ),
            stop=self.stop,
        )

    def _batches(self, shard: Shard) -> Iterator[Rollouts]:
        for batch in self._reader([shard]):
            self.stop.check()
            yield batch

    def _predict(self, critic: Critic, shard: Shard, *, forest: bool) -> Iterator[Event]:
        """Have all values of a file in its log."""
        stage = f"predicting {shard.name}"
        with ValueLog(self._log(shard.name)) as log:
            for block in blocks(self._reader([shard])):
                self.stop.check()
                if not log.has(int(block.response_mask.sum())):
                    values = yield from predict_with_progress(
                        critic,
                        block,
                        self.compute,
                        forest=forest,
                        stop=self.stop,
                        stage=stage,
                        before=int(block.row[0]),
                        total=shard.num_rows,
                    )
                    if not np.isfinite(values).all():
                        raise ModelError(
                            f"{self.settings.prediction.model} predicts NaN or infinite values on {shard.name}",
                            hint="--precision fp32 may help; a run that diverged has earlier checkpoints",
                        )
                    log.append(values[block.response_mask])
                    if sentence := self.compute.lowered():
                        yield Notice(message=sentence, level="warning")
                yield Progress(stage=stage, done=int(block.row[-1]) + 1, total=shard.num_rows)

    def _log(self, file: str) -> Path:
        """The log of a file's values; removed when the file is written."""
        return self.output.work / self.targets[file].relative_to(self.output.path).with_suffix(".values")

    def _moments(self, shards: list[Shard]) -> Generator[Event, None, Whitening]:
        """Mean and variance of all advantages."""
        whitening = Whitening()
        for done, shard in enumerate(shards):
            with LoggedValues(self._log(shard.name)) as log:
                for batch in self._batches(shard):
                    whitening.add(self.columns.advantages(batch, self._written(shard, batch, log)))
            yield Progress(stage="whitening", done=done + 1, total=len(shards), unit="files")
        return whitening

    def _write(self, shard: Shard, whitening: Whitening | None, *, empty: bool) -> Iterator[Event]:
        """Write a file from its log."""
        columns = iter(()) if empty else self._new_columns(shard, whitening)
        renames, target = column_renames(self.settings.reading.column), self.targets[shard.name]
        for row in rewrite_with_columns(shard, target, self.columns, renames, columns, self.stop):
            yield Progress(stage=f"writing {target}", done=row, total=shard.num_rows)
        if not self.needs_everything:
            remove(self._log(shard.name))

    def _new_columns(self, shard: Shard, whitening: Whitening | None) -> Iterator[ColumnBatch]:
        with LoggedValues(self._log(shard.name)) as log:
            for batch in self._batches(shard):
                yield self.columns.of(batch, self._written(shard, batch, log), whitening)

    def _logged(self, shards: list[Shard]) -> Iterator[tuple[str, Rollouts, NDArray[np.float32], int]]:
        """(file, its next rollouts, their values, rows so far): one pass, as groups are told from the uids of all."""
        reader = self._reader(shards)
        with ExitStack() as opened:
            first, log = -1, None
            for batch in reader:
                self.stop.check()
                *before, (name, _) = reader.files_read
                begin = sum(rows for _, rows in before)
                if log is None or begin != first:
                    opened.close()
                    first, log = begin, opened.enter_context(LoggedValues(self._log(name)))
                values = log.over(batch.response_mask)
                yield name, replace(batch, row=batch.row - begin), values, int(batch.row[-1]) + 1

    def _fuse(self, shards: list[Shard]) -> Generator[Event, None, FusedValues]:
        """Estimate the fused baseline from all files."""
        fused = FusedValues(ReturnRecipe.of(self.settings.returns))
        total = sum(shard.num_rows for shard in shards)
        for name, batch, values, done in self._logged(shards):
            fused.add(name, batch, values)
            yield Progress(stage="fusing", done=done, total=total)
        weights = fused.estimate()
        shares = (f"{float(x.mean()):.2f}" for x in (weights.prompt_weight, weights.response_weight))
        message = "fused: {} of the other rollouts' mean residual, {} of the critic's movement along the response"
        yield Notice(message=message.format(*shares))
        return fused

    def _written(self, shard: Shard, batch: Rollouts, log: LoggedValues) -> NDArray[np.float32]:
        """The values that are written for the next rollouts of a file."""
        values = log.over(batch.response_mask)
        return values if self.fused is None else self.fused.of(shard.name, batch, values)

    def result(self, status: str, shards: list[Shard], part: tuple[int, int]) -> dict[str, Any]:
        """What `--json` prints."""
        done = [shard for shard in shards if self.output.is_written(shard.name)]
        return {
            "status": status,
            "to": str(self.output.path),
            "model": self.settings.prediction.model,
            "columns": list(self.settings.written),
            "part": f"{part[0]}/{part[1]}",
            "files": len(done),
            "files_in_all": len(shards),
            "rows": sum(shard.num_rows for shard in done),
            "rows_left_out": self.rows_left_out,
            "files_left_out": self.bad_files.summary(),
            "next": self._next(shards),
        }

    def _next(self, shards: list[Shard]) -> str:
        """The command that trains on what is written."""
        needs = needs_of_fit(shards, column_renames(self.settings.reading.column), self.settings.written)
        return next_command(FitSettings, self.settings, READING + COMPUTE, data=[self.settings.prediction.to], **needs)


NOT_PART_OF_THE_RESULT = ("to", "part")


def predict(settings: PredictSettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Write shards again with a critic's values, and the returns and advantages computed from them. Streams.

    All rows are read and checked before the model runs. Values are logged to disk as they are computed, so that a job
    that was stopped or killed resumes where it was; files that are written are not written again.

    Args:
        settings: what to predict, and what to write.
        stop: checked between micro-batches and pieces of files.

    Yields:
        Progress and notices; RunEnded last.

    Raises:
        CriticTrainError: an error that the user can fix.
    """
    stop = stop or StopRequest()
    part = part_of_this_process(settings)
    compute = Compute(
        device=resolve_device(device_of(settings.compute.device)),
        precision="fp32",
        max_tokens=settings.compute.max_tokens or CPU_MAX_TOKENS,
    )
    compute.precision = resolve_precision(settings.compute.precision, compute.device)
    bad_files = BadFiles()
    shards = find_shards(settings.reading.data, bad_files)
    targets = target_paths(shards, settings.reading.data, Path(settings.prediction.to or ""))
    source = critic_source(Path(settings.prediction.model or ""))
    with OutputDirectory(Path(settings.prediction.to or ""), "predict", targets, part) as output:
        for message in output.compare(_record(settings, shards, source, compute)):
            yield Notice(message=message, level="warning")
        mine = shards[part[0] - 1 :: part[1]]
        job = Job(
            settings=settings,
            source=source,
            compute=compute,
            output=output,
            targets=targets,
            bad_files=bad_files,
            stop=stop,
        )
        if all(output.is_written(shard.name) for shard in mine):
            output.clear()
            yield RunEnded(status="already finished", result=job.result("already finished", mine, part))
            return
        try:
            yield from job.run(mine)
        except Stopped:
            yield RunEnded(
                status="interrupted",
                result=job.result("interrupted", mine, part),
                signal_number=stop.signal_number,
            )
            return
        output.clear()
        yield RunEnded(status="finished", result=job.result("finished", mine, part))


def _record(settings: PredictSettings, shards: list[Shard], source: ModelSource, compute: Compute) -> dict[str, Any]:
    """What the output depends on; a later run of the same command compares it."""
    recorded = {name: value for name, value in as_dict(settings).items() if name not in NOT_PART_OF_THE_RESULT}
    if recorded["baseline"] == "critic":
        del recorded["baseline"]  # as in records from before there was a choice
    if recorded["group_by"] is None:
        del recorded["group_by"]  # likewise
    return {
        "settings": recorded | {"precision": compute.precision},
        "data": fingerprint(shards),
        "model": model_digest(source.path),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
