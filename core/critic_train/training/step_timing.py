"""How long training takes on the rollouts at hand: a few steps as the run will take them, timed and thrown away."""

import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from critic_train.data.rollout_cache import write_cache
from critic_train.events import Event, Notice, Progress
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.microbatches import micro_batches, predict_values
from critic_train.rollouts import Rollouts
from critic_train.settings import OptimizerSettings
from critic_train.stopping import Stopped, StopRequest
from critic_train.training.dataset import RolloutSet
from critic_train.training.frozen_cache import ROWS, CachedStates, cache_states
from critic_train.training.optimizer import build_optimizer
from critic_train.training.train_step import LossRecipe, accumulate_gradient, clip_gradient
from critic_train.training.weight_average import WeightAverage

TIMED_STEPS = 3
"""After one that warms up; their median counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """What timed steps took.

    Attributes:
        train_seconds_per_token: forward and backward, for each token that is laid out; with cached states, of the
            trained part alone.
        predict_seconds_per_token: forward alone, likewise.
        cache_seconds_per_token: the one pass that caches a frozen trunk's states; 0 where none are cached.
        optimizer_seconds: the clip and the step.
        moment_bytes: of the optimizer's state.
        peak_memory_bytes: the most memory held meanwhile.
    """

    train_seconds_per_token: float
    predict_seconds_per_token: float
    cache_seconds_per_token: float
    optimizer_seconds: float
    moment_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How rollouts are laid out.

    Attributes:
        computed_tokens: positions that go through the model, padding included.
        read_states: positions whose state the head reads.
    """

    computed_tokens: int
    read_states: int

    @classmethod
    def of(cls, rollouts: Rollouts, compute: Compute, *, forest: bool) -> "Layout":
        """Lay rollouts out, and count."""
        on_cpu = replace(compute, device=torch.device("cpu"), attention="sdpa", states=None)
        computed = read = 0
        for batch in micro_batches(rollouts, on_cpu, forest=forest):
            computed += batch.computed_tokens
            read += len(batch.read_positions)
        return cls(computed_tokens=computed, read_states=read)


def time_steps(
    critic: Critic,
    rollouts: Rollouts,
    settings: OptimizerSettings,
    compute: Compute,
    *,
    forest: bool,
    caches_states: bool,
    stop: StopRequest,
) -> Generator[Event, None, StepTimes]:
    """Time the steps of a run.

    Args:
        critic: in training mode, its packing chosen; its weights do not change, for the learning rate is 0.
        rollouts: a few, as the run caches them, with targets.
        settings: the optimizer, its batch size and clip.
        compute: device, precision and token budget.
        forest: lay rollouts out as a forest, or as padded rows.
        caches_states: whether a frozen trunk's states are cached; they go to a temporary directory meanwhile.
        stop: checked between micro-batches.

    Yields:
        Progress, and a notice where memory ran out.

    Raises:
        OSError: the temporary directory's disk is full.
        Stopped: asked to stop.
    """
    cache_seconds = 0.0
    with tempfile.TemporaryDirectory(prefix="critic-train-") as folder:
        if caches_states:
            yield Progress(stage="timing the frozen trunk", done=0, total=1, unit="passes")
            states, cache_seconds = _time_caching(critic, rollouts, compute, Path(folder), forest=forest, stop=stop)
            compute = replace(compute, states=states)
            # What is trained on them takes so little that a step's own cost counts: steps as large as the run's.
            rollouts = states.cache.read(np.arange(min(len(rollouts), settings.batch_size)))
        yield Progress(stage="timing steps", done=0, total=TIMED_STEPS, unit="steps")
        times = _time_training(critic, rollouts, settings, compute, cache_seconds, forest=forest, stop=stop)
    if sentence := compute.lowered():
        yield Notice(message=sentence, level="warning")
    return times


def _time_caching(
    critic: Critic, rollouts: Rollouts, compute: Compute, folder: Path, *, forest: bool, stop: StopRequest
) -> tuple[CachedStates, float]:
    """The states of some rollouts, and the seconds per token that they took."""
    rollouts = rollouts.take(np.argsort(rollouts.row))
    cache = write_cache(folder / "few", [rollouts])
    index = np.arange(len(rollouts), dtype=np.int64)
    rollout_set = RolloutSet(cache=cache, index=index, files=[], renames={})
    for _ in range(2):  # the first pass allocates
        cache.drop_column(ROWS)
        began = _now(compute)
        states = _return_value(cache_states(critic, rollout_set, compute, forest=forest, stop=stop))
        seconds = _now(compute) - began
    return states, seconds / Layout.of(rollouts, compute, forest=forest).computed_tokens


def _return_value(events: Generator[Event, None, CachedStates]) -> CachedStates:
    """What a generator returns."""
    while True:
        try:
            next(events)
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]


def _time_training(
    critic: Critic,
    rollouts: Rollouts,
    settings: OptimizerSettings,
    compute: Compute,
    cache_seconds: float,
    *,
    forest: bool,
    stop: StopRequest,
) -> StepTimes:
    recipe = LossRecipe(cliprange_value=None, mode="token-mean", scale_factor=None)
    optimizer = build_optimizer(
        critic.train(), lr=0.0, head_lr=0.0, weight_decay=0.0, kind=settings.optimizer, offload=compute.offload
    )
    average = WeightAverage(critic, decay=0.0) if compute.averages_weights else None
    rows: list[tuple[float, float, float, int]] = []
    for _ in range(1 + TIMED_STEPS):
        began = _now(compute)
        result = accumulate_gradient(critic, rollouts, recipe, compute, forest=forest, stop=stop)
        trained = _now(compute)
        clip_gradient(critic, settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update(1)
        stepped = _now(compute)
        if predict_values(critic, rollouts, compute, forest=forest, stop=stop) is None:
            raise Stopped
        rows.append((trained - began, stepped - trained, _now(compute) - stepped, result.computed_tokens))
    # The first one allocates, and on CUDA compiles and tunes.
    train, step, predict, tokens = np.median(np.asarray(rows[1:]), axis=0).tolist()
    return StepTimes(
        train_seconds_per_token=train / tokens,
        predict_seconds_per_token=predict / tokens,
        cache_seconds_per_token=cache_seconds,
        optimizer_seconds=step,
        moment_bytes=_state_bytes(optimizer),
        peak_memory_bytes=compute.peak_memory_bytes(),
    )


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state, without step counts; a tensor that parameters share counts once."""
    tensors = {
        id(value): value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    }
    return sum(tensors.values())


def _now(compute: Compute) -> float:
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)
    return time.perf_counter()
