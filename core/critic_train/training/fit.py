"""`critic-train fit`, top to bottom: shards, rollouts, critic, optimizer, loop, result. All ranks run the same."""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from critic_train.callbacks.callback import Callback, ReportWriter, with_callbacks
from critic_train.callbacks.trackers import require_packages, trackers
from critic_train.data.shards import SUFFIXES
from critic_train.distributed.init import init_ranks
from critic_train.distributed.ranks import Ranks
from critic_train.errors import ModelError
from critic_train.events import Event, Notice, RunEnded, RunStarted
from critic_train.model.compute import Compute, resolve_compute, resolve_offload
from critic_train.model.memory import give_back_freed_memory, keep_freed_memory
from critic_train.model.sequence_sharing import refuse_sequence_parallel
from critic_train.run.checkpoint import checkpoint_step, newest_checkpoint
from critic_train.run.run_directory import ReadOnlyRun, RunDirectory
from critic_train.settings import FitSettings, RunSettings, offloads
from critic_train.stopping import Stopped, StopRequest
from critic_train.training.build import (
    build_run_critic,
    build_run_optimizer,
    build_trainer,
    export_notice,
    new_run_head,
    prepare_critic,
    selfcheck_sample,
    source_notices,
)
from critic_train.training.dataset import RunData, data_notices, open_data
from critic_train.training.divergence import diverged
from critic_train.training.plan import make_plan
from critic_train.training.recipe import Recipe, recipe_of_run, with_recipe
from critic_train.training.run_record import (
    compare_with_before,
    cuts_as_they_come,
    find_resume_checkpoint,
    find_return_scale,
    recipe_before,
    recorded_reasons,
    require_room_for_checkpoints,
    resolved_summary,
    result_of,
    result_paths,
    resumed_settings,
)
from critic_train.training.run_shards import (
    NO_SHARDS,
    RunShards,
    find_run_shards,
    read_rollouts,
    row_limits,
    uid_lookup,
)
from critic_train.training.state_files import begin_with_remembered_budget
from critic_train.training.targets import Targets, choices_without_columns
from critic_train.training.trainer import Trainer
from critic_train.weights.first_pass import read_base_model
from critic_train.weights.loading import ModelSource
from critic_train.weights.lora import adapter_notice


def fit(settings: FitSettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Train a critic, or resume a run that was stopped.

    Args:
        settings: of the command.
        stop: set it to have the run write a checkpoint and end.

    Yields:
        What happens; RunEnded last.

    Raises:
        CriticTrainError: an error that the user can mend; the run directory stays usable.
    """
    stop = stop or StopRequest()
    require_packages(settings.run)
    sharded, nproc = offloads(resolve_offload(settings.compute), "all"), settings.compute.nproc
    try:
        with init_ranks(settings, nproc=nproc, device=settings.compute.device, sharded=sharded, stop=stop) as ranks:
            yield from _run(settings, ranks, stop)
    except Stopped:  # while ranks were started
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)


class _Beginning(NamedTuple):
    """What a run begins with.

    Attributes:
        settings: as given, and where the shards lack what they need as it can be done.
        data: the rollouts, read and split.
        resumed: the name of the checkpoint from which the run goes on, if any.
        scale: of the returns.
        recipe: what was chosen for settings that were not given.
        response_ids: those that occur in the training responses, where they were counted for it.
    """

    settings: FitSettings
    data: RunData
    resumed: str | None
    scale: float
    recipe: Recipe
    response_ids: list[int] | None


def _run(settings: FitSettings, ranks: Ranks, stop: StopRequest) -> Iterator[Event]:
    """What all ranks do once they have met: rank 0 reads, all train."""
    began, out, compute = time.monotonic(), run_path(settings), resolve_compute(settings.compute, ranks)
    refuse_sequence_parallel(settings.compute, ranks.size)
    shards = find_run_shards(settings.reading) if ranks.is_main else NO_SHARDS
    source = read_base_model(settings.model, out, ranks)
    with RunDirectory(out) if ranks.is_main else ReadOnlyRun(out) as run:
        # What rank 0 reads and decides is broadcast, so that all ranks go on with the same.
        try:
            before = compare_with_before(settings, run, shards, source, ranks.size)
            finished = yield from _on_rank_0(ranks, stop, before)
            if finished is not None:
                yield from _already_finished(run, finished, ranks)
                return
            begun = yield from _begin(settings, run, shards, source, ranks, stop)
        except Stopped:  # before there is anything to save
            yield RunEnded(status="interrupted", signal_number=stop.signal_number)
            return

        # From here on all ranks do the same, each with its share of the work; rank 0 alone writes.
        stop, settings = ranks.agreed_stop(stop), begun.settings
        if begun.resumed:
            settings = resumed_settings(settings, run, ranks.size)
            # What had chosen itself is given by now, and still may change as it might have.
            compute = replace(
                resolve_compute(settings.compute, ranks),
                may_keep_less=compute.may_keep_less,
                may_offload=compute.may_offload,
                cut_as_they_come=cuts_as_they_come(run),
            )
        checkpoint = run.checkpoints / begun.resumed if begun.resumed else None
        settings = with_recipe(settings, begun.recipe)
        compute.averages_weights = bool(settings.optimizer.ema_decay)
        trainer = yield from _build(settings, begun, run, shards, source, checkpoint, compute, stop)
        yield from with_callbacks(trainer.train(), _callbacks(settings.run, trainer) if ranks.is_main else [])
        yield from _finish(trainer, stop, time.monotonic() - began, ranks)


def _begin(
    settings: FitSettings,
    run: RunDirectory,
    shards: RunShards,
    source: ModelSource | None,
    ranks: Ranks,
    stop: StopRequest,
) -> Generator[Event, None, _Beginning]:
    """Have rank 0 read the rollouts, and choose what depends on them. All ranks call it.

    Raises:
        Stopped: asked to stop.
    """
    chosen = yield from _on_rank_0(ranks, stop, choices_without_columns(settings, shards.train.shards))
    settings = settings.replace(**chosen)
    targets = Targets.of(settings.returns, settings.loss)
    limits = row_limits(settings.reading.max_length, source)
    reading = read_rollouts(settings.reading, targets, shards, limits, run, stop)
    names = yield from _on_rank_0(ranks, stop, reading)
    data = yield from open_data(settings.reading, targets, run.cache, names, settings.optimizer.seed)
    resumed = yield from _on_rank_0(ranks, stop, find_resume_checkpoint(run))
    scale = yield from _on_rank_0(ranks, stop, find_return_scale(run, data.train, settings.loss, resumed))
    choosing = recipe_of_run(settings, source, targets, data.train, run, resumed)
    recipe, response_ids = yield from _on_rank_0(ranks, stop, choosing)
    return _Beginning(settings, data, resumed, scale, recipe, response_ids)


def _build(
    settings: FitSettings,
    begun: _Beginning,
    run: RunDirectory,
    shards: RunShards,
    source: ModelSource | None,
    checkpoint: Path | None,
    compute: Compute,
    stop: StopRequest,
) -> Generator[Event, None, Trainer]:
    """The trainer of a run at its first step, or where its checkpoint was written. All ranks call it."""
    ranks, data, shape = compute.ranks, begun.data, begun.data.shape
    yield from begin_with_remembered_budget(run, compute.max_tokens, compute)
    plan = make_plan(settings.optimizer, data.train.groups, settings.run.eval_every)
    yield from source_notices(source, settings, compute, shape, new=checkpoint is None)
    critic = build_run_critic(settings.model, source, checkpoint, compute, shape, settings.optimizer.seed)
    yield from [*export_notice(critic), *adapter_notice(critic)]
    prepared = prepare_critic(
        critic,
        compute,
        settings.compute,
        settings.model.train,
        settings.optimizer.optimizer,
        selfcheck_sample(data.train, plan),
        data.train.largest_group,
        longest=shape.max_length,
        tokens=settings.optimizer.batch_size * shape.max_length,
        run_tokens=int(plan.passes * data.train.cache.lengths[data.train.index].sum()),
        new_head=new_run_head(settings, data.train, source, checkpoint, begun.response_ids, ranks),
        checking=_has_passed_before(checkpoint),
    )
    if compute.device.type == "cpu":
        keep_freed_memory() if prepared.compute.sequence is None else give_back_freed_memory()
    if settings.compute.max_tokens is None and compute.device.type == "cuda":  # it has been chosen by now
        yield from begin_with_remembered_budget(run, prepared.chosen["max_tokens"], prepared.compute)
    yield from prepared.notices
    optimizer = build_run_optimizer(prepared, settings.optimizer, source, begun.scale)
    uids = uid_lookup(shards, data, settings.reading)
    trainer = build_trainer(settings, run, data, plan, prepared, optimizer, source, uids, begun.scale, stop)
    recipe = begun.recipe | prepared.reasons
    if checkpoint is not None:
        yield from trainer.checkpointer.load(checkpoint)
        recipe |= recorded_reasons(run, prepared.chosen)
    yield from _start(settings, trainer, ranks, recipe, prepared.chosen)
    return trainer


@contextmanager
def _has_passed_before(checkpoint: Path | None) -> Iterator[None]:
    """A check with which a run begins: where the weights of a later step no longer pass it, training has diverged."""
    try:
        yield
    except ModelError as error:
        if checkpoint is None or not (steps := checkpoint_step(checkpoint)):
            raise
        what = f"the weights of {checkpoint.name} compute nothing that can be trained: {error.message}"
        raise diverged(what, steps_taken=steps) from error


def _on_rank_0(ranks: Ranks, stop: StopRequest, work: Generator[Event, None, Any]) -> Generator[Event, None, Any]:
    """Have rank 0 do some work; all ranks return what it returned.

    Args:
        ranks: all of them call this.
        stop: takes over the signal that stopped rank 0.
        work: yields events and returns what JSON can hold; on the other ranks it is not begun.

    Raises:
        Stopped: rank 0 was asked to stop meanwhile.
    """
    answer: dict[str, Any] = {}
    if ranks.is_main:
        try:
            answer = {"returned": (yield from work)}
        except Stopped:
            answer = {"signal_number": stop.signal_number}
    answer = ranks.broadcast(answer)
    if "signal_number" in answer:
        stop.signal_number = answer["signal_number"]
        raise Stopped
    return answer["returned"]


def _already_finished(run: RunDirectory, result: dict[str, Any], ranks: Ranks) -> Iterator[Event]:
    """End where an earlier start has finished the run."""
    if ranks.is_main:
        newest, _ = newest_checkpoint(run.checkpoints)
        result = result | result_paths(run, newest) | {"status": "already finished"}
        run.drop_cache()  # a kill may have come between the result and this
        yield from _cleanup_warnings(run)
    yield RunEnded(status="already finished", result=result if ranks.is_main else {})


def _start(
    settings: FitSettings, trainer: Trainer, ranks: Ranks, recipe: Recipe, chosen: dict[str, Any]
) -> Iterator[Event]:
    """Open the logs and record what was resolved, before the first step of this start."""
    run, plan, position = trainer.run, trainer.plan, trainer.state.position
    if ranks.is_main:
        require_room_for_checkpoints(trainer, settings.run)
    run.open_logs(position.metrics_bytes)
    yield from data_notices(trainer.data, Targets.of(settings.returns, settings.loss))
    record: dict[str, Any] = {
        "resolved": resolved_summary(settings, trainer),
        "recipe": recipe_before(run, chosen) | recipe,
        "chosen": chosen,
    }
    if not trainer.runtime.compute.cut_as_they_come:
        record["tree_cuts"] = "least"
    run.write_json("run.json", (run.read_json("run.json") or {}) | record)
    yield RunStarted(
        out=str(run.path),
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        first_step=position.step,
        summary=record["resolved"],
    )


def _finish(trainer: Trainer, stop: StopRequest, elapsed_seconds: float, ranks: Ranks) -> Iterator[Event]:
    """Write the result of a run that has come to its end, or report where it was interrupted."""
    run, stopped = trainer.run, stop.requested  # read once: a signal may come at any moment
    if not stopped and trainer.evaluator is not None:
        yield from trainer.evaluator.closing_notice()
    result = result_of(trainer, "interrupted" if stopped else "finished", elapsed_seconds)
    if not stopped:
        run.write_json("result.json", result)
        run.drop_cache()
    yield from _cleanup_warnings(run)
    yield RunEnded(status=result["status"], result=result if ranks.is_main else {}, signal_number=stop.signal_number)


def _callbacks(settings: RunSettings, trainer: Trainer) -> list[Callback]:
    """The trackers and the report writer of a run."""
    run = trainer.run
    record = run.read_json("run.json") or {}
    callbacks = trackers(
        settings,
        run.path,
        run_id=str(record.get("id", "")),
        first_step=trainer.state.position.step,
        config=record,
    )
    return callbacks if settings.no_report else [*callbacks, ReportWriter(run.path)]


def _cleanup_warnings(run: RunDirectory) -> Iterator[Event]:
    """What could not be removed, as warnings: it ends no run."""
    for message in run.warnings:
        yield Notice(message=message, level="warning")
    run.warnings.clear()


def run_path(settings: FitSettings) -> Path:
    """The run directory: --out, or runs/ and the name of the first data folder or file."""
    if settings.run.out is not None:
        return Path(settings.run.out)
    parts = [part for part in Path(settings.reading.data[0]).parts if not any(c in part for c in "*?[")]
    named = Path(*parts).resolve()
    return Path("runs") / (named.stem if named.suffix in SUFFIXES else named.name)
