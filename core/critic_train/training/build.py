"""From settings and rollouts to a trainer at its first step: critic, learning rates, optimizer, notices about them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from critic_train.data.addresses import UidLookup
from critic_train.data.scanning import SAMPLED_ROLLOUTS
from critic_train.distributed.ranks import Ranks
from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.events import Event, Notice, Progress
from critic_train.model.automatic import set_memory, with_offload
from critic_train.model.compiling import compile_or_not
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic, freeze_all_but_last
from critic_train.model.fsdp import cost_of, shard
from critic_train.model.sequence_sharing import choose_layout, cut_before_host_memory
from critic_train.model_files.config import preset_config
from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import CheckpointManager
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import (
    FitSettings,
    ModelSettings,
    OptimizerKind,
    OptimizerSettings,
    TrainComputeSettings,
    trained_layers,
)
from critic_train.stopping import StopRequest
from critic_train.training.checkpointer import Checkpointer
from critic_train.training.dataset import DataShape, RolloutSet, RunData
from critic_train.training.evaluator import Evaluator
from critic_train.training.exact_head import ExactHead
from critic_train.training.frozen_cache import no_cached_states_notice, supports_cached_states
from critic_train.training.next_token_loss import (
    NewHead,
    response_id_counts,
    starts_as_vocabulary_head,
)
from critic_train.training.old_values import OldValues
from critic_train.training.optimizer import build_optimizer
from critic_train.training.plan import MiniBatches, TrainingPlan
from critic_train.training.recipe import LR_NEW_HEAD, Recipe, starts_new_head
from critic_train.training.state import CriticRuntime, TrainingState
from critic_train.training.state_files import StateFiles
from critic_train.training.targets import Targets
from critic_train.training.train_step import LossRecipe
from critic_train.training.trainer import Trainer
from critic_train.training.weight_average import WeightAverage
from critic_train.weights.loading import ModelSource, build_critic, read_model
from critic_train.weights.lora import add_adapters, load_adapters
from critic_train.weights.saving import exported_class, loads_for_token_classification
from critic_train.weights.sharded_loading import load_critic_on_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedCritic:
    """A critic that is ready to be trained.

    Attributes:
        critic: in training mode, on its device or sharded over the ranks.
        compute: device, precision and token budget, attention resolved.
        forest: whether rollouts are laid out as a forest of shared prefixes, or as padded rows.
        caches_states: whether the hidden states of its frozen part can be cached.
        chosen: the settings that can choose themselves, and what they are: chosen, or as they were given.
        reasons: those that have, with value and reason, as in a `Recipe`.
        notices: about packing, attention, what was chosen, and cached states.
    """

    critic: Critic
    compute: Compute
    forest: bool
    caches_states: bool
    chosen: dict[str, Any]
    reasons: Recipe
    notices: list[Notice]


def build_run_critic(
    model: ModelSettings,
    source: ModelSource | None,
    checkpoint: Path | None,
    compute: Compute,
    shape: DataShape,
    seed: int,
) -> Critic:
    """The critic of a run on the CPU; what --train leaves frozen needs no gradient. All ranks call it.

    Args:
        model: what to start from, and what to train.
        source: what --model names; None for a new transformer.
        checkpoint: the one to resume from, if any.
        compute: with several ranks in it, a critic that is loaded is loaded in shards.
        shape: of the rollouts.
        seed: of new weights.

    Raises:
        ModelError: weights do not fit, or the architecture has no such part to train.
        ConfigError: peft is not installed.
    """
    if checkpoint is not None and model.train != "lora":
        critic = load_critic_on_ranks(read_model(checkpoint), compute)
    elif source is None:
        assert model.preset is not None, "the recipe has chosen one"
        config = preset_config(model.preset, max_token_id=shape.max_token_id, max_length=shape.max_length)
        critic = build_critic(config, seed, model.head_inputs or "last")
        critic.head.set_constant(shape.mean_return)
    else:
        if starts_new_head(model, source):
            source = replace(source, stored_head=None, new_head_inputs=model.head_inputs or "last")
        adapters = partial(add_adapters, rank=model.lora_rank, alpha=model.lora_alpha, seed=seed)
        critic = load_critic_on_ranks(source, compute, adapters if model.train == "lora" else None)
        if checkpoint is None and starts_new_head(model, source):
            critic.head.set_constant(shape.mean_return)
        if model.train == "lora" and checkpoint is not None:
            load_adapters(critic, checkpoint)
    layers = trained_layers(model.train)
    if layers is not None:
        freeze_all_but_last(critic.trunk, layers)
    return critic


def prepare_critic(
    critic: Critic,
    compute: Compute,
    settings: TrainComputeSettings,
    train: str | None,
    kind: OptimizerKind,
    sample: Rollouts,
    largest_group: Callable[[], Rollouts],
    longest: int,
    tokens: int | None = None,
    run_tokens: int = 0,
    new_head: NewHead | None = None,
    checking: AbstractContextManager[None] | None = None,
) -> PreparedCritic:
    """Put a critic on its device and choose packing, attention, memory options and cached states. All ranks call it.

    Args:
        critic: from `build_run_critic`.
        compute: device, precision and token budget.
        settings, train, kind: packing, attention and memory options; --train; --optimizer.
        sample: rollouts to try packing and attention on.
        largest_group: reads those of the largest prompt, to which the token budget of a GPU is fitted.
        longest, tokens: of the longest rollout; about the most of a mini-batch, None where that is not known.
        run_tokens: of all rollouts that are trained on, as often as they are.
        new_head: for the next token, which the critic is given; None for none.
        checking: entered while it is checked what the critic computes.

    Raises:
        ModelError: the architecture cannot be trained so.
        MachineError: there is not memory enough for a single rollout.
    """
    on_cuda = compute.device.type == "cuda"
    compute, choices = with_offload(critic, compute, settings, kind, new_head.parameters(critic) if new_head else 0)
    critic, compute = to_device_or_shard(critic, compute)
    choose = partial(choose_layout, critic, sample, settings, compute, longest=longest, tokens=tokens)
    with checking or nullcontext():
        layout = choose()
    of_head = [] if new_head is None else [new_head.add_to(critic, compute)]
    largest = largest_group() if on_cuda else sample
    compute.cut_first = cut_before_host_memory(critic, compute, settings, forest=layout.packing.forest)
    checkpointing, more = set_memory(critic, compute, settings, kind, largest, forest=layout.packing.forest)
    packing, notices, cuts = choose(before=layout) if on_cuda else layout
    choices = [*choices, *more, *cuts] if on_cuda else cuts
    compiling = compile_or_not(critic, compute, settings, train, largest, forest=packing.forest, run_tokens=run_tokens)
    if compiling.choice is not None:
        choices, checkpointing = [*choices, compiling.choice], compute.keeping.kind
    notices += [*(Notice(message=choice.sentence()) for choice in choices), *of_head, *compiling.notices]
    caches_states = False
    if (layers := trained_layers(train)) is not None:
        caches_states = supports_cached_states(critic, layers, sample, compute, forest=packing.forest)
        notices += [] if caches_states else [no_cached_states_notice(critic)]
    return PreparedCritic(
        critic=critic,
        compute=compute,
        forest=packing.forest,
        caches_states=caches_states,
        chosen=_chosen(compute, checkpointing) | {"compile": compiling.value},
        reasons={choice.name: {"value": choice.value, "reason": choice.reason} for choice in choices},
        notices=notices,
    )


def _chosen(compute: Compute, checkpointing: str) -> dict[str, Any]:
    """The settings that have chosen themselves or were given, as run.json has them."""
    return {
        "precision": compute.precision,
        "max_tokens": compute.max_tokens,
        "activation_checkpointing": checkpointing,
        "offload": compute.offload,
        "sequence_parallel": compute.sequence_size,
    }


def to_device_or_shard(critic: Critic, compute: Compute) -> tuple[Critic, Compute]:
    """A critic in training mode, on its device; or sharded over the ranks or into host memory, gathered by layer.

    Returns:
        (critic, compute): with sharding, `compute` knows the cost of attention, by which work is shared out.
    """
    critic.train()
    if not compute.ranks.sharded:
        return critic.to(compute.device), compute
    compute = replace(compute, pair_cost=cost_of(critic).pair)
    return shard(critic, compute), compute


def new_run_head(
    settings: FitSettings,
    train: RolloutSet,
    source: ModelSource | None,
    checkpoint: Path | None,
    response_ids: list[int] | None,
    ranks: Ranks,
) -> NewHead | None:
    """A next-token head for a run's critic, where --lm-loss-weight asks for one. All ranks call it.

    `response_ids` are those of `train`, ascending; None where they have not been counted yet.
    """
    if not settings.loss.lm_loss_weight:
        return None
    counted = np.flatnonzero(response_id_counts(train, ranks)) if response_ids is None else response_ids
    ids = np.asarray(counted, dtype=np.int64)
    return NewHead(ids=ids, source=source, checkpoint=checkpoint, seed=settings.optimizer.seed)


def build_run_optimizer(
    prepared: PreparedCritic,
    settings: OptimizerSettings,
    source: ModelSource | None,
    return_scale: float,
) -> torch.optim.Optimizer:
    """The optimizer of a run; see `build_optimizer`."""
    lr, head_lr, critic = settings.lr, settings.head_lr, prepared.critic
    assert lr is not None, "the recipe has chosen one"
    assert head_lr is not None, "the recipe has chosen one"
    knows = critic.next_token_head is None or starts_as_vocabulary_head(critic, source)
    return build_optimizer(
        critic,
        lr=lr,
        head_lr=head_lr,
        next_token_lr=lr if knows else max(lr, LR_NEW_HEAD),
        weight_decay=settings.weight_decay,
        kind=settings.optimizer,
        offload=prepared.compute.offload,
        return_scale=return_scale,
    )


def selfcheck_sample(train: RolloutSet, plan: TrainingPlan) -> Rollouts:
    """Rollouts to try packing on: some of the first mini-batch, which share prompts, and the longest."""
    longest = int(train.cache.lengths[train.index].argmax())
    return train.read(np.append(plan.mini_batch(0, 0)[:SAMPLED_ROLLOUTS], longest))


def build_trainer(
    settings: FitSettings,
    run: RunDirectory,
    data: RunData,
    plan: TrainingPlan,
    prepared: PreparedCritic,
    optimizer: torch.optim.Optimizer,
    source: ModelSource | None,
    uids: UidLookup,
    return_scale: float,
    stop: StopRequest,
) -> Trainer:
    """The trainer of a run at its first step; its checkpointer can then load the step to resume from."""
    decay = settings.optimizer.ema_decay
    average = WeightAverage(prepared.critic, decay) if decay else None
    runtime = CriticRuntime(
        critic=prepared.critic, compute=prepared.compute, forest=prepared.forest, stop=stop, average=average
    )
    targets, loss = Targets.of(settings.returns, settings.loss), LossRecipe.of(settings.loss, return_scale)
    state, seed = TrainingState(), settings.optimizer.seed
    old_values = _old_values(settings, runtime, data.train)
    checkpointer = Checkpointer(
        run=run,
        manager=CheckpointManager(run.checkpoints, settings.run.keep),
        every=settings.run.checkpoint_every,
        runtime=runtime,
        optimizer=optimizer,
        state=state,
        plan=plan,
        seed=seed,
        max_tokens=prepared.chosen["max_tokens"],
        files=StateFiles(prepared.critic, optimizer, source.path if source else None, prepared.compute.ranks, average),
        old_values=old_values,
    )
    return Trainer(
        settings=settings.optimizer,
        run=run,
        data=data,
        plan=plan,
        batches=MiniBatches(data.train, plan, targets, values_per_epoch=old_values is not None),
        runtime=runtime,
        optimizer=optimizer,
        loss=loss,
        old_values=old_values,
        evaluator=_build_evaluator(settings, run, data, plan, runtime, uids, loss, state),
        checkpointer=checkpointer,
        state=state,
        # Without a step all states are needed once, to solve the head or to evaluate it: nothing is kept then.
        caches_states=prepared.caches_states and plan.total_steps > 0,
        exact_head=ExactHead.of(settings, runtime, data.train),
    )


def _old_values(settings: FitSettings, runtime: CriticRuntime, train: RolloutSet) -> OldValues | None:
    """What takes V_old of each epoch, where the clip or the targets need it."""
    needed = LossRecipe.of(settings.loss).cliprange_value is not None
    needed = needed or Targets.of(settings.returns, settings.loss).moving
    return OldValues(runtime=runtime, train=train) if settings.loss.old_values == "epoch" and needed else None


def _build_evaluator(
    settings: FitSettings,
    run: RunDirectory,
    data: RunData,
    plan: TrainingPlan,
    runtime: CriticRuntime,
    uids: UidLookup,
    loss: LossRecipe,
    state: TrainingState,
) -> Evaluator | None:
    """None where no rollouts are held out."""
    if data.held_out is None:
        return None
    return Evaluator(
        runtime=runtime,
        held_out=data.held_out,
        uids=uids,
        cliprange_value=loss.cliprange_value,
        advantage=AdvantageRecipe.of(Targets.of(settings.returns, settings.loss).recipe),
        seed=settings.optimizer.seed,
        plan=plan,
        best_by=settings.run.best_by,
        patience=settings.run.patience,
        state=state,
        run=run,
    )


def source_notices(
    source: ModelSource | None, settings: FitSettings, compute: Compute, shape: DataShape, *, new: bool
) -> Iterator[Event]:
    """Notices about what a run starts from, before its weights are loaded; and that they are loaded next.

    Args:
        source: what --model names.
        settings: of the run, resolved.
        compute: of the run.
        shape: of the rollouts.
        new: whether training starts at step 0.
    """
    yield from source.notices if source is not None else ()
    if source is not None and starts_new_head(settings.model, source):
        there = f"has {source.head}.weight, which is not used" if source.head else "has no value head"
        made = f"made, weight 0 and bias {shape.mean_return:.4g} (the mean return)"
        if settings.model.head_init == "exact":
            made = "solved by least squares on its hidden states (--head-init exact)"
        if new:
            yield Notice(message=f"{source.path} {there}: a new one is {made}")
    elif source is not None:
        yield Notice(message=f"the value head is {source.head}.weight of {source.path}")
    offload = settings.compute.offload
    if offload not in ("auto", compute.offload):
        yield Notice(message=f"--offload {offload} changes nothing on a CPU: all is in host memory already")
    yield Progress(stage="loading the model", done=0, total=0)


def export_notice(critic: Critic) -> Iterator[Event]:
    """A warning where transformers cannot load a critic's checkpoints as a token classifier; and what comes next."""
    if not loads_for_token_classification(critic):
        yield Notice(
            message=f"transformers has no token-classification class for {critic.trunk.config.model_type}: checkpoints "
            f"are written as {exported_class(critic)} with score.weight and score.bias beside it. "
            "critic-train loads them and AutoModel loads their trunk; verl does not",
            level="warning",
        )
    yield Progress(stage="trying a few rollouts: packing and attention", done=0, total=0)
