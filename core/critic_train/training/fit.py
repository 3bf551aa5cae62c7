"""`critic-train fit`, from top to bottom: shards, model, plan, trainer, result."""

import time
import uuid
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.data.shards import SUFFIXES
from critic_train.distributed.ranks import Ranks, joined
from critic_train.errors import ConfigError
from critic_train.events import Event, Notice, RunEnded, RunStarted
from critic_train.judging.verdict import without_tables
from critic_train.model.compute import Compute, resolve_compute
from critic_train.model.critic import Critic
from critic_train.model.freezing import freeze
from critic_train.model.loading import ModelSource, build_critic, load_critic, read_model
from critic_train.model.lora import add_adapters, load_adapters
from critic_train.model.memory import trade_memory
from critic_train.model.presets import LEARNING_RATES, preset_config
from critic_train.model.saving import exported_class, loads_for_token_classification
from critic_train.model.selfcheck import SAMPLED_ROLLOUTS, PackingChoice, settle
from critic_train.observing.observer import Observer, observed
from critic_train.observing.report import ReportWriter
from critic_train.observing.trackers import require_packages, trackers
from critic_train.reporting.place import PAGE
from critic_train.run.checkpoint import checkpoints, newest_checkpoint, resolve_model
from critic_train.run.directory import RunDirectory, refuse_changes
from critic_train.run.followed import FollowedRun
from critic_train.run.model_digest import model_digest
from critic_train.settings import FitSettings, as_dict
from critic_train.settings.model import trained_layers
from critic_train.stopping import StopRequest
from critic_train.training.dataset import (
    RunData,
    RunShards,
    data_read_by_rank_0,
    find_run_shards,
    limits_of,
    open_data,
)
from critic_train.training.kept_states import give_states
from critic_train.training.optimizer import build_optimizer
from critic_train.training.plan import TrainingPlan, make_plan
from critic_train.training.resuming import require_room_for_cache, require_room_for_checkpoints, take_up
from critic_train.training.step import LossRecipe
from critic_train.training.targets import Targets
from critic_train.training.trainer import Trainer
from critic_train.versions import versions

LR_FINE_TUNING = 1e-5
LR_ADAPTERS = 1e-4
"""LoRA learns best at about ten times the rate of full fine-tuning (Biderman et al. 2024, arXiv 2405.09673)."""
LR_NEW_HEAD = 1e-3


def fit(settings: FitSettings, stop: StopRequest) -> Iterator[Event]:
    """Train a critic, or go on with a run that was stopped.

    Args:
        settings: what to do.
        stop: set it to have the run write a checkpoint and end.

    Yields:
        What happens; RunEnded last.

    Raises:
        CriticTrainError: a fault that the user can mend; the run directory stays usable.
    """
    require_packages(settings)
    with joined(settings, nproc=settings.nproc, device=settings.device) as ranks:
        if ranks.size > 1 and settings.train == "lora":
            raise ConfigError(
                f"--train lora runs on one process, not on {ranks.size}",
                hint="--train full, last-K and head run on any number",
            )
        compute = resolve_compute(settings, ranks)
        yield from (_lead if ranks.leads else _follow)(settings, compute, stop)


def _lead(settings: FitSettings, compute: Compute, stop: StopRequest) -> Iterator[Event]:
    """The run as rank 0 goes through it, or the only process: all that is read, decided, judged and written."""
    began, ranks = time.monotonic(), compute.ranks
    shards = find_run_shards(settings)
    if settings.model and Path(settings.model).resolve() == run_path(settings).resolve():
        raise ConfigError(f"--model and --out are both {settings.model}", hint="give the new run an --out of its own")
    source = read_model(resolve_model(Path(settings.model))) if settings.model else None
    with RunDirectory(run_path(settings)) as run:
        if run.left_by:
            yield Notice(message=f"{run.path} was last held by {run.left_by}, which is gone: its lock is taken over")
        finished = yield from _compare_with_before(settings, run, shards, source, ranks)
        if finished is not None:
            ranks.tell(None)
            newest, _ = newest_checkpoint(run.checkpoints)
            places = _places(run, newest)
            run.drop_cache()  # a kill may have come between the result and this
            yield from _warnings(run)
            yield RunEnded(status="already finished", result=finished | places | {"status": "already finished"})
            return
        require_room_for_cache(run, shards.data + shards.val_data)
        data = yield from open_data(settings, shards, limits_of(settings, source), run.cache, stop)
        if data is None:
            ranks.tell(None)
            yield RunEnded(status="interrupted", signal_number=stop.signal_number)
            return
        checkpoint = yield from take_up(run)
        ranks.tell(
            {
                "out": str(run.path),
                "sets": data.names,
                "model": str(source.path) if source else None,
                "checkpoint": str(checkpoint) if checkpoint else None,
            }
        )
        stop = ranks.agreeing(stop)
        trainer = yield from _prepare(settings, run, data, source, checkpoint, compute, stop)
        yield from observed(trainer.train(), _observers(trainer))
        stopped = stop.requested  # looked at once: a signal may come at any moment
        result = _result(trainer, began, "interrupted" if stopped else "finished")
        if not stopped:
            run.write_json("result.json", result)
            run.drop_cache()
        yield from _warnings(run)
        yield RunEnded(status=result["status"], result=result, signal_number=stop.signal_number)


def _follow(settings: FitSettings, compute: Compute, stop: StopRequest) -> Iterator[Event]:
    """The run as the other ranks go through it: what rank 0 has read and decided, and the same steps."""
    told = compute.ranks.hear()
    if told is None:
        yield RunEnded(status="already finished")
        return
    with FollowedRun(Path(told["out"])) as run:
        data = data_read_by_rank_0(settings, run.cache, told["sets"])
        source = read_model(Path(told["model"])) if told["model"] else None
        checkpoint = Path(told["checkpoint"]) if told["checkpoint"] else None
        stop = compute.ranks.agreeing(stop)
        trainer = yield from _prepare(settings, run, data, source, checkpoint, compute, stop)
        yield from trainer.train()
        status = "interrupted" if stop.requested else "finished"
        yield RunEnded(status=status, signal_number=stop.signal_number)


def _observers(trainer: Trainer) -> list[Observer]:
    """Those who look on while this run goes."""
    record = trainer.run.read_json("run.json") or {}
    tracking = trackers(
        trainer.settings,
        trainer.run.path,
        run_id=str(record.get("id", "")),
        first_step=trainer.position.step,
        config=record,
    )
    return tracking if trainer.settings.no_report else [*tracking, ReportWriter(trainer.run.path)]


def _warnings(run: RunDirectory) -> Iterator[Event]:
    """What could not be cleared away ends no run."""
    for message in run.warnings:
        yield Notice(message=message, level="warning")
    run.warnings.clear()


def run_path(settings: FitSettings) -> Path:
    """Where the run goes: --out, or runs/ and the name of the first data folder or file."""
    if settings.out is not None:
        return Path(settings.out)
    parts = [part for part in Path(settings.data[0]).parts if not any(c in part for c in "*?[")]
    named = Path(*parts).resolve()
    return Path("runs") / (named.stem if named.suffix in SUFFIXES else named.name)


def _compare_with_before(
    settings: FitSettings, run: RunDirectory, shards: RunShards, source: ModelSource | None, ranks: Ranks
) -> Generator[Event, None, dict[str, Any] | None]:
    """Write run.json, or hold this command against the one the run was started with.

    A run without a checkpoint has nothing to lose, so it may be started anew with other settings.

    Returns:
        The result, where the run is finished.
    """
    record = {
        "settings": as_dict(settings),
        "data": shards.data_fingerprint,
        "val_data": shards.val_fingerprint,
        "model": model_digest(source.path) if source else None,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
    }
    before = run.read_json("run.json")
    if not checkpoints(run.checkpoints):
        run.start_afresh()
        run.write_json("run.json", {"id": uuid.uuid4().hex[:8], **record})
        return None
    if before is None:
        raise ConfigError(
            f"{run.path} has checkpoints but no readable run.json: nobody can say how it was started",
            hint="put run.json back, or give this run another --out",
        )
    for message in refuse_changes(before, record, run.path):
        yield Notice(message=message, level="warning")
    return run.read_json("result.json")


def _prepare(
    settings: FitSettings,
    run: RunDirectory,
    data: RunData,
    source: ModelSource | None,
    checkpoint: Path | None,
    compute: Compute,
    stop: StopRequest,
) -> Generator[Event, None, Trainer]:
    """Model, plan and optimizer, at the checkpoint to go on from; yields notices and RunStarted."""
    new_head = source is None or source.head is None
    yield from _head_notices(source, data, checkpoint)
    critic = _critic(settings, data, source, checkpoint, compute)
    layers = trained_layers(settings.train)
    if layers is not None:
        freeze(critic.trunk, layers)
    critic, compute = _spread(critic, compute)
    if not loads_for_token_classification(critic):
        yield Notice(
            message=f"transformers has no token-classification class for {critic.trunk.config.model_type}: checkpoints "
            f"are written as {exported_class(critic)} with score.weight and score.bias beside it. critic-train loads "
            "them and AutoModel loads their trunk; verl does not",
            level="warning",
        )
    plan = make_plan(settings, data.train.groups)
    sample = data.train.read(_sample(data, plan))
    choice, said = settle(critic, sample, settings, compute)
    yield from _rope_notice(critic, data.max_length)
    for sentence in said:
        yield Notice(message=sentence, level="warning")
    trade_memory(critic, settings)
    fine_tuning = LR_ADAPTERS if settings.train == "lora" else LR_FINE_TUNING
    lr = settings.lr if settings.lr is not None else (fine_tuning if source else LEARNING_RATES[settings.preset])
    head_lr = settings.head_lr if settings.head_lr is not None else (max(lr, LR_NEW_HEAD) if new_head else lr)
    clip = None if settings.no_clip or settings.old_values == "none" else settings.cliprange_value
    trainer = Trainer(
        settings=settings,
        run=run,
        data=data,
        plan=plan,
        critic=critic,
        optimizer=build_optimizer(
            critic, lr=lr, head_lr=head_lr, weight_decay=settings.weight_decay, kind=settings.optimizer
        ),
        compute=compute,
        recipe=LossRecipe(cliprange_value=clip, mode=settings.loss_agg_mode, scale_factor=settings.loss_scale_factor),
        targets=Targets.of(settings),
        forest=choice.forest,
        tokenizer_from=source.path if source else None,
        stop=stop,
    )
    if layers is not None and compute.ranks.size == 1:
        trainer.keeps_states = give_states(critic, layers, sample, compute, forest=choice.forest)
        if not trainer.keeps_states:
            yield Notice(
                message=f"the last layers of {critic.trunk.config.model_type} do not work on kept states: every epoch "
                "goes through the frozen part again",
                level="warning",
            )
    if checkpoint is not None:
        trainer.resume(checkpoint)
        yield Notice(message=f"resuming from {checkpoint.name}")
    if compute.ranks.leads:
        require_room_for_checkpoints(trainer)
    run.open_logs(trainer.position.metrics_bytes)
    if data.held_out is None:
        yield Notice(message="no held-out rollouts: nothing will say how good the critic is", level="warning")
    elif trainer.targets.moving:
        yield Notice(
            message="held-out rollouts are judged against Monte-Carlo returns: GAE's move with this critic's values"
        )
    summary = _summary(trainer, choice)
    run.write_json("run.json", (run.read_json("run.json") or {}) | {"resolved": summary})
    yield RunStarted(
        out=str(run.path),
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        first_step=trainer.position.step,
        summary=summary,
    )
    return trainer


def _sample(data: RunData, plan: TrainingPlan) -> NDArray[np.int64]:
    """int64, places of the rollouts the self-check tries: a few that stand together, and the longest."""
    longest = int(data.train.spool.lengths[data.train.index].argmax())
    return np.append(plan.mini_batch(0, 0)[:SAMPLED_ROLLOUTS], longest)


def _rope_notice(critic: Critic, max_length: int) -> Iterator[Event]:
    """A warning where transformers chooses rotary frequencies by the longest rollout of a micro-batch."""
    rope = getattr(critic.trunk.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    original = rope.get("original_max_position_embeddings") or critic.trunk.config.max_position_embeddings
    if kind in ("longrope", "dynamic") and max_length > original:
        yield Notice(
            message=f"rope_type {kind} takes its frequencies from the longest rollout of a micro-batch: rollouts on "
            f"both sides of {original} tokens influence each other, and --max-tokens then changes the result",
            level="warning",
        )


def _head_notices(source: ModelSource | None, data: RunData, checkpoint: Path | None) -> Iterator[Event]:
    if source is not None and source.head is None and checkpoint is None:
        yield Notice(
            message=f"{source.path} has no value head: a new one is made, weight 0 and bias "
            f"{data.train.mean_return:.4g} (the mean return)"
        )
    elif source is not None and source.head is not None:
        yield Notice(message=f"the value head is {source.head}.weight of {source.path}")


def _spread(critic: Critic, compute: Compute) -> tuple[Critic, Compute]:
    """The critic on its device, over all ranks where there are several, and how to share out its work."""
    critic.to(compute.device).train()
    if compute.ranks.size > 1:
        from critic_train.distributed.sharding import cost_of, shard

        compute = replace(compute, pair_cost=cost_of(critic).pair)
        shard(critic, compute)
    return critic, compute


def _critic(
    settings: FitSettings, data: RunData, source: ModelSource | None, checkpoint: Path | None, compute: Compute
) -> Critic:
    if checkpoint is not None and settings.train != "lora":
        return load_critic(read_model(checkpoint), compute)
    if source is not None:
        critic = load_critic(source, compute)
        if source.head is None:
            critic.head.start_at(data.train.mean_return)
        if settings.train == "lora":
            add_adapters(critic, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=settings.seed)
            if checkpoint is not None:
                load_adapters(critic, checkpoint)
        return critic
    config = preset_config(settings.preset, max_token_id=data.max_token_id, max_length=data.max_length)
    critic = build_critic(config, settings.seed)
    critic.head.start_at(data.train.mean_return)
    return critic


def _summary(trainer: Trainer, choice: PackingChoice) -> dict[str, Any]:
    settings, data, plan = trainer.settings, trainer.data, trainer.plan
    held_out = data.held_out
    skipped = sum(int(part.get("count", 0)) for part in data.left_out.values())
    return {
        "rollouts": len(data.train),
        "prompt_groups": len(set(data.train.groups.tolist())),
        "response_tokens": data.train.response_tokens,
        "held_out_rollouts": len(held_out) if held_out else 0,
        "rows_left_out": skipped,
        "files_left_out": sum(int(part["count"]) for part in data.files_left_out.values()),
        "mean_return": data.train.mean_return,
        "returns": trainer.targets.in_words() if trainer.targets.recipe.from_rewards else None,
        "model": settings.model or f"{settings.preset} (from scratch)",
        "architecture": exported_class(trainer.critic),
        "parameters": sum(p.numel() for p in trainer.critic.parameters()),
        "packing": "forest" if choice.forest else "rows",
        "attention": trainer.compute.attention if choice.forest else "as transformers has it",
        "device": str(trainer.compute.device),
        "precision": trainer.compute.precision,
        "lr": trainer.optimizer.param_groups[0]["peak_lr"],
        "head_lr": trainer.optimizer.param_groups[-1]["peak_lr"],
        "steps": plan.total_steps,
        "warmup_steps": plan.warmup_steps,
        "eval_every": plan.eval_every,
    }


def _result(trainer: Trainer, began: float, status: str) -> dict[str, Any]:
    """What `--json` prints: how the run ended and how good its best critic is."""
    judged = trainer.best_evaluation or trainer.last_evaluation
    evaluation = without_tables(judged or {})
    if "baselines" in evaluation:
        evaluation["baselines"] = {name: without_tables(found) for name, found in evaluation["baselines"].items()}
    return {
        "status": status,
        **_places(trainer.run, trainer.checkpoint),
        "steps": trainer.position.step,
        "total_steps": trainer.plan.total_steps,
        "best_step": trainer.position.best_step,
        "skips": trainer.position.skips,
        "stopped_early": trainer.out_of_patience,
        "training": trainer.last_metrics,
        "rows_left_out": trainer.data.left_out,
        "files_left_out": trainer.data.files_left_out,
        **evaluation,
        "elapsed_seconds": time.monotonic() - began,
    }


def _places(run: RunDirectory, newest: Path | None) -> dict[str, Any]:
    """Where the run's results stand, as seen from here."""
    return {
        "out": str(run.path),
        "checkpoint": str(newest) if newest else None,
        "best": str(run.path / "best") if run.best else None,
        "report": str(run.path / PAGE) if (run.path / PAGE).is_file() else None,
    }
