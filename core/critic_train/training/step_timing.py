"""How fast a critic trains on the rollouts at hand: a few steps as the run will take them, timed and thrown away."""

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
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.dataset import RolloutSet
from critic_train.training.frozen_cache import ROWS, CachedStates, cache_states
from critic_train.training.optimizer import build_optimizer
from critic_train.training.train_step import LossRecipe, accumulate_gradient, apply_gradient

TIMED_STEPS = 3
"""After one that warms up; their median counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What timed steps on the data at hand took.

    Attributes:
        train_seconds_a_token: forward and backward, for each token that is laid out; with kept states, of the trained
            part alone.
        predict_seconds_a_token: forward alone, likewise.
        keep_seconds_a_token: the one pass that keeps a frozen trunk's states; 0 where none are kept.
        optimizer_seconds: the clip and the step.
        moment_bytes: what the optimizer holds.
        peak_memory_bytes: the most memory held meanwhile.
    """

    train_seconds_a_token: float
    predict_seconds_a_token: float
    keep_seconds_a_token: float
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
        here = replace(compute, device=torch.device("cpu"), attention="sdpa", states=None)
        computed = read = 0
        for batch in micro_batches(rollouts, here, forest=forest):
            computed += batch.computed_tokens
            read += len(batch.read_positions)
        return cls(computed_tokens=computed, read_states=read)


def measure(
    critic: Critic,
    few: Rollouts,
    settings: FitSettings,
    compute: Compute,
    *,
    forest: bool,
    keeps_states: bool,
    stop: StopRequest,
) -> Generator[Event, None, Pace | None]:
    """Time what a run does.

    Args:
        critic: in training mode, its packing chosen; it is not moved, for the learning rate is 0.
        few: rollouts as the run keeps them, with targets.
        settings: of the run.
        compute: device, precision and token budget.
        forest: lay rollouts out as a forest, or as padded rows.
        keeps_states: whether a frozen trunk's states are kept; they then go to a temporary directory meanwhile.
        stop: looked at between micro-batches.

    Yields:
        Progress, and a notice where memory ran out.

    Returns:
        None when asked to stop.

    Raises:
        OSError: the temporary directory's disk is full.
    """
    keeping = 0.0
    with tempfile.TemporaryDirectory(prefix="critic-train-") as folder:
        if keeps_states:
            yield Progress(stage="timing the frozen trunk", done=0, total=1, unit="passes")
            kept = _kept(critic, few, compute, Path(folder), forest=forest, stop=stop)
            if kept is None:
                return None
            states, keeping = kept
            compute = replace(compute, states=states)
            # What is trained on them takes so little that a step's own cost counts: steps as large as the run's.
            few = states.spool.read(np.arange(min(len(few), settings.optimizer.batch_size)))
        yield Progress(stage="timing steps", done=0, total=TIMED_STEPS, unit="steps")
        pace = _timed(critic, few, settings, compute, keeping, forest=forest, stop=stop)
    if sentence := compute.lowered():
        yield Notice(message=sentence, level="warning")
    return pace


def _kept(
    critic: Critic, few: Rollouts, compute: Compute, folder: Path, *, forest: bool, stop: StopRequest
) -> tuple[CachedStates, float] | None:
    """The states of some rollouts, and the seconds a token that they took."""
    few = few.take(np.argsort(few.row))
    spool = write_cache(folder / "few", [few])
    rollouts = RolloutSet(spool=spool, index=np.arange(len(few), dtype=np.int64), files=[])
    states: CachedStates | None = None
    began = 0.0
    for _ in range(2):  # the first pass allocates
        spool.drop_column(ROWS)
        began = _now(compute)
        states = _last(cache_states(critic, rollouts, compute, forest=forest, stop=stop))
        if states is None:
            return None
    assert states is not None
    seconds = _now(compute) - began
    return states, seconds / Layout.of(few, compute, forest=forest).computed_tokens


def _last(events: Generator[Event, None, CachedStates | None]) -> CachedStates | None:
    """What a generator returns."""
    while True:
        try:
            next(events)
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]


def _timed(
    critic: Critic,
    few: Rollouts,
    settings: FitSettings,
    compute: Compute,
    keeping: float,
    *,
    forest: bool,
    stop: StopRequest,
) -> Pace | None:
    recipe = LossRecipe(cliprange_value=None, mode="token-mean", scale_factor=None)
    optimizer = build_optimizer(
        critic.train(),
        lr=0.0,
        head_lr=0.0,
        weight_decay=0.0,
        kind=settings.optimizer.optimizer,
        offload=compute.offload,
    )
    rows: list[tuple[float, float, float, int]] = []
    for _ in range(1 + TIMED_STEPS):
        began = _now(compute)
        result = accumulate_gradient(critic, few, recipe, compute, forest=forest, stop=stop)
        if result is None:
            return None
        trained = _now(compute)
        apply_gradient(critic, optimizer, settings.optimizer.grad_clip, result.value_loss)
        stepped = _now(compute)
        if predict_values(critic, few, compute, forest=forest, stop=stop) is None:
            return None
        rows.append((trained - began, stepped - trained, _now(compute) - stepped, result.computed_tokens))
    # The first one allocates, and on CUDA compiles and tunes.
    train, step, predict, tokens = np.median(np.asarray(rows[1:]), axis=0).tolist()
    return Pace(
        train_seconds_a_token=train / tokens,
        predict_seconds_a_token=predict / tokens,
        keep_seconds_a_token=keeping,
        optimizer_seconds=step,
        moment_bytes=_held(optimizer),
        peak_memory_bytes=compute.peak_memory_bytes(),
    )


def _held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state; step counts aside, and what parameters share once."""
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
