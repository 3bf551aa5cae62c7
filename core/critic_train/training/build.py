"""The critic that a run trains: loaded, drawn or taken from a checkpoint; frozen or with adapters as --train says.

From settings and rollouts to a trainer at its first step: model, plan, optimizer, and where to go on from.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from critic_train.events import Event, Notice, RunStarted
from critic_train.model.compute import Compute
from critic_train.model.config import LEARNING_RATES, preset_config
from critic_train.model.critic import Critic, freeze_all_but_last
from critic_train.model.fsdp import cost_of, shard
from critic_train.model.loading import ModelSource, build_critic, read_model
from critic_train.model.lora import add_adapters, load_adapters
from critic_train.model.memory import apply_memory_options
from critic_train.model.saving import exported_class, loads_for_token_classification
from critic_train.model.selfcheck import SAMPLED_ROLLOUTS, select_packing
from critic_train.model.sharded_loading import load_critic_on_ranks
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import FitSettings, trained_layers
from critic_train.stopping import StopRequest
from critic_train.training.dataset import RunData
from critic_train.training.frozen_cache import not_kept, supports_cached_states
from critic_train.training.optimizer import build_optimizer
from critic_train.training.plan import TrainingPlan, make_plan
from critic_train.training.run_record import require_room_for_checkpoints, summary_of
from critic_train.training.state_files import begin_with_remembered_budget
from critic_train.training.targets import Targets
from critic_train.training.train_step import LossRecipe
from critic_train.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a critic that is made anew takes from the rollouts.

    Attributes:
        max_token_id: the largest token id.
        max_length: tokens of the longest rollout.
        mean_return: over masked tokens; what a new head predicts.
    """

    max_token_id: int
    max_length: int
    mean_return: float


def build_run_critic(
    settings: FitSettings, source: ModelSource | None, checkpoint: Path | None, compute: Compute, shape: Shape
) -> Critic:
    """The critic of a run; what `--train` leaves alone needs no gradient.

    Args:
        settings: of the run.
        source: what --model names; None for a new transformer.
        checkpoint: the one to go on from, if any.
        compute: with several ranks in it, a critic that is loaded is loaded in parts; all of them call this.
        shape: of the rollouts.

    Raises:
        ModelError: weights do not fit, or the architecture has no such part to train.
        ConfigError: peft is not installed.
    """
    critic = _critic(settings, source, checkpoint, compute, shape)
    layers = trained_layers(settings.model.train)
    if layers is not None:
        freeze_all_but_last(critic.trunk, layers)
    return critic


def to_device_or_shard(critic: Critic, compute: Compute) -> tuple[Critic, Compute]:
    """A critic in training mode where it is to compute, and how its work is shared out.

    That is the device; or parts of it on all ranks, or in host memory, which are put together there layer by layer.
    """
    critic.train()
    if not compute.ranks.sharded:
        return critic.to(compute.device), compute
    compute = replace(compute, pair_cost=cost_of(critic).pair)
    return shard(critic, compute), compute


def _critic(
    settings: FitSettings, source: ModelSource | None, checkpoint: Path | None, compute: Compute, shape: Shape
) -> Critic:
    if checkpoint is not None and settings.model.train != "lora":
        return load_critic_on_ranks(read_model(checkpoint), compute)
    if source is None:
        config = preset_config(settings.model.preset, max_token_id=shape.max_token_id, max_length=shape.max_length)
        critic = build_critic(config, settings.optimizer.seed)
        critic.head.set_constant(shape.mean_return)
        return critic
    adapters = partial(
        add_adapters, rank=settings.model.lora_rank, alpha=settings.model.lora_alpha, seed=settings.optimizer.seed
    )
    critic = load_critic_on_ranks(source, compute, adapters if settings.model.train == "lora" else None)
    if source.head is None:
        critic.head.set_constant(shape.mean_return)
    if settings.model.train == "lora" and checkpoint is not None:
        load_adapters(critic, checkpoint)
    return critic


LR_FINE_TUNING = 1e-5
LR_ADAPTERS = 1e-4
"""LoRA learns best at about ten times the rate of full fine-tuning (Biderman et al. 2024, arXiv 2405.09673)."""
LR_NEW_HEAD = 1e-3


def build_trainer(
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
    yield from begin_with_remembered_budget(run, settings, compute)
    yield from _head_notices(source, data, checkpoint)
    if settings.compute.offload != compute.offload:
        yield Notice(
            message=f"--offload {settings.compute.offload} changes nothing on a CPU: all is in host memory already"
        )
    shape = Shape(max_token_id=data.max_token_id, max_length=data.max_length, mean_return=data.train.mean_return)
    critic = build_run_critic(settings, source, checkpoint, compute, shape)
    critic, compute = to_device_or_shard(critic, compute)
    if not loads_for_token_classification(critic):
        yield Notice(
            message=f"transformers has no token-classification class for {critic.trunk.config.model_type}: checkpoints "
            f"are written as {exported_class(critic)} with score.weight and score.bias beside it. critic-train loads "
            "them and AutoModel loads their trunk; verl does not",
            level="warning",
        )
    plan = make_plan(settings, data.train.groups)
    sample = data.train.read(_sample(data, plan))
    choice, said = select_packing(critic, sample, settings.compute, compute)
    yield from _rope_notice(critic, data.max_length)
    for sentence in said:
        yield Notice(message=sentence, level="warning")
    apply_memory_options(critic, settings.compute)
    fine_tuning = LR_ADAPTERS if settings.model.train == "lora" else LR_FINE_TUNING
    lr = (
        settings.optimizer.lr
        if settings.optimizer.lr is not None
        else (fine_tuning if source else LEARNING_RATES[settings.model.preset])
    )
    head_lr = (
        settings.optimizer.head_lr
        if settings.optimizer.head_lr is not None
        else (max(lr, LR_NEW_HEAD) if new_head else lr)
    )
    clip = None if settings.loss.no_clip or settings.loss.old_values == "none" else settings.loss.cliprange_value
    trainer = Trainer(
        settings=settings,
        run=run,
        data=data,
        plan=plan,
        critic=critic,
        optimizer=build_optimizer(
            critic,
            lr=lr,
            head_lr=head_lr,
            weight_decay=settings.optimizer.weight_decay,
            kind=settings.optimizer.optimizer,
            offload=compute.offload,
        ),
        compute=compute,
        recipe=LossRecipe(
            cliprange_value=clip, mode=settings.loss.loss_agg_mode, scale_factor=settings.loss.loss_scale_factor
        ),
        targets=Targets.of(settings),
        forest=choice.forest,
        tokenizer_from=source.path if source else None,
        stop=stop,
    )
    layers = trained_layers(settings.model.train)
    if layers is not None:
        trainer.keeps_states = supports_cached_states(critic, layers, sample, compute, forest=choice.forest)
        if not trainer.keeps_states:
            yield Notice(message=not_kept(critic), level="warning")
    if checkpoint is not None:
        yield from trainer.resume(checkpoint)
    if compute.ranks.is_main:
        require_room_for_checkpoints(trainer)
    run.open_logs(trainer.position.metrics_bytes)
    if data.held_out is None:
        yield Notice(message="no held-out rollouts: nothing will say how good the critic is", level="warning")
    elif trainer.targets.moving:
        yield Notice(
            message="held-out rollouts are judged against Monte-Carlo returns: GAE's move with this critic's values"
        )
    summary = summary_of(trainer, choice)
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
