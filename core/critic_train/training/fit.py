"""`critic-train fit`, from top to bottom: shards, model, plan, trainer, result."""

import time
from collections.abc import Iterator
from pathlib import Path

from critic_train.callbacks.callback import Callback, with_callbacks
from critic_train.callbacks.report_writer import ReportWriter
from critic_train.callbacks.trackers import require_packages, trackers
from critic_train.data.shards import SUFFIXES
from critic_train.distributed.init import init_ranks
from critic_train.errors import ConfigError
from critic_train.events import Event, Notice, RunEnded
from critic_train.model.compute import Compute, resolve_compute, resolve_offload
from critic_train.model.loading import read_model
from critic_train.run.checkpoint import newest_checkpoint, resolve_model
from critic_train.run.run_directory import ReadOnlyRun, RunDirectory
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.build import build_trainer
from critic_train.training.dataset import data_read_by_rank_0, find_run_shards, limits_of, open_data
from critic_train.training.run_record import (
    compare_with_before,
    find_resume_checkpoint,
    places_of,
    require_room_for_cache,
    result_of,
)
from critic_train.training.trainer import Trainer


def fit(settings: FitSettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Train a critic, or go on with a run that was stopped.

    Args:
        settings: what to do.
        stop: set it to have the run write a checkpoint and end.

    Yields:
        What happens; RunEnded last.

    Raises:
        CriticTrainError: a fault that the user can mend; the run directory stays usable.
    """
    stop = stop or StopRequest()
    require_packages(settings.run)
    sharded = resolve_offload(settings.compute) == "all"
    with init_ranks(settings, nproc=settings.compute.nproc, device=settings.compute.device, sharded=sharded) as ranks:
        compute = resolve_compute(settings.compute, ranks)
        yield from (_lead if ranks.is_main else _follow)(settings, compute, stop)


def _lead(settings: FitSettings, compute: Compute, stop: StopRequest) -> Iterator[Event]:
    """The run as rank 0 goes through it, or the only process: all that is read, decided, judged and written."""
    began, ranks = time.monotonic(), compute.ranks
    shards = find_run_shards(settings)
    if settings.model.model and Path(settings.model.model).resolve() == run_path(settings).resolve():
        raise ConfigError(
            f"--model and --out are both {settings.model.model}", hint="give the new run an --out of its own"
        )
    source = read_model(resolve_model(Path(settings.model.model))) if settings.model.model else None
    with RunDirectory(run_path(settings)) as run:
        if run.left_by:
            yield Notice(message=f"{run.path} was last held by {run.left_by}, which is gone: its lock is taken over")
        finished = yield from compare_with_before(settings, run, shards, source, ranks)
        if finished is not None:
            ranks.broadcast(None)
            newest, _ = newest_checkpoint(run.checkpoints)
            places = places_of(run, newest)
            run.drop_cache()  # a kill may have come between the result and this
            yield from _warnings(run)
            yield RunEnded(status="already finished", result=finished | places | {"status": "already finished"})
            return
        require_room_for_cache(run, shards.data + shards.val_data)
        data = yield from open_data(settings, shards, limits_of(settings, source), run.cache, stop)
        if data is None:
            ranks.broadcast(None)
            yield RunEnded(status="interrupted", signal_number=stop.signal_number)
            return
        checkpoint = yield from find_resume_checkpoint(run)
        ranks.broadcast(
            {
                "out": str(run.path),
                "sets": data.names,
                "model": str(source.path) if source else None,
                "checkpoint": str(checkpoint) if checkpoint else None,
            }
        )
        stop = ranks.agreed_stop(stop)
        trainer = yield from build_trainer(settings, run, data, source, checkpoint, compute, stop)
        yield from with_callbacks(trainer.train(), _callbacks(trainer))
        stopped = stop.requested  # looked at once: a signal may come at any moment
        result = result_of(trainer, began, "interrupted" if stopped else "finished")
        if not stopped:
            run.write_json("result.json", result)
            run.drop_cache()
        yield from _warnings(run)
        yield RunEnded(status=result["status"], result=result, signal_number=stop.signal_number)


def _follow(settings: FitSettings, compute: Compute, stop: StopRequest) -> Iterator[Event]:
    """The run as the other ranks go through it: what rank 0 has read and decided, and the same steps."""
    told = compute.ranks.broadcast(None)
    if told is None:
        yield RunEnded(status="already finished")
        return
    with ReadOnlyRun(Path(told["out"])) as run:
        data = data_read_by_rank_0(settings, run.cache, told["sets"])
        source = read_model(Path(told["model"])) if told["model"] else None
        checkpoint = Path(told["checkpoint"]) if told["checkpoint"] else None
        stop = compute.ranks.agreed_stop(stop)
        trainer = yield from build_trainer(settings, run, data, source, checkpoint, compute, stop)
        yield from trainer.train()
        status = "interrupted" if stop.requested else "finished"
        yield RunEnded(status=status, signal_number=stop.signal_number)


def _callbacks(trainer: Trainer) -> list[Callback]:
    """The callbacks of this run: its trackers, and its report unless --no-report."""
    record = trainer.run.read_json("run.json") or {}
    tracking = trackers(
        trainer.settings.run,
        trainer.run.path,
        run_id=str(record.get("id", "")),
        first_step=trainer.position.step,
        config=record,
    )
    return tracking if trainer.settings.run.no_report else [*tracking, ReportWriter(trainer.run.path)]


def _warnings(run: RunDirectory) -> Iterator[Event]:
    """What could not be cleared away ends no run."""
    for message in run.warnings:
        yield Notice(message=message, level="warning")
    run.warnings.clear()


def run_path(settings: FitSettings) -> Path:
    """Where the run goes: --out, or runs/ and the name of the first data folder or file."""
    if settings.run.out is not None:
        return Path(settings.run.out)
    parts = [part for part in Path(settings.reading.data[0]).parts if not any(c in part for c in "*?[")]
    named = Path(*parts).resolve()
    return Path("runs") / (named.stem if named.suffix in SUFFIXES else named.name)
