"""The critic that a run trains: loaded, drawn or taken from a checkpoint; frozen or with adapters as --train says."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.freezing import freeze
from critic_train.model.loading import ModelSource, build_critic, load_critic, read_model
from critic_train.model.lora import add_adapters, load_adapters
from critic_train.model.presets import preset_config
from critic_train.settings import FitSettings
from critic_train.settings.model import trained_layers


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


def critic_of(
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
    layers = trained_layers(settings.train)
    if layers is not None:
        freeze(critic.trunk, layers)
    return critic


def placed(critic: Critic, compute: Compute) -> tuple[Critic, Compute]:
    """A critic in training mode where it is to compute, and how its work is shared out.

    That is the device; or parts of it on all ranks, or in host memory, which are put together there layer by layer.
    """
    critic.train()
    if not compute.ranks.sharded:
        return critic.to(compute.device), compute
    from critic_train.distributed.sharding import cost_of, shard

    compute = replace(compute, pair_cost=cost_of(critic).pair)
    return shard(critic, compute), compute


def _critic(
    settings: FitSettings, source: ModelSource | None, checkpoint: Path | None, compute: Compute, shape: Shape
) -> Critic:
    if checkpoint is not None and settings.train != "lora":
        return load_critic(read_model(checkpoint), compute)
    if source is None:
        config = preset_config(settings.preset, max_token_id=shape.max_token_id, max_length=shape.max_length)
        critic = build_critic(config, settings.seed)
        critic.head.start_at(shape.mean_return)
        return critic
    adapters = partial(add_adapters, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=settings.seed)
    critic = load_critic(source, compute, adapters if settings.train == "lora" else None)
    if source.head is None:
        critic.head.start_at(shape.mean_return)
    if settings.train == "lora" and checkpoint is not None:
        load_adapters(critic, checkpoint)
    return critic
