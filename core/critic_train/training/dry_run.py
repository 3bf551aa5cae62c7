"""`critic-train fit --dry-run`: what the run would take, from its data, its model and a few timed steps."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from critic_train.data.order import kept_together, split_groups
from critic_train.data.reading import RolloutReader
from critic_train.doctor.survey import Survey, sharing
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.model.compute import Compute, resolve_compute
from critic_train.model.critic import Critic
from critic_train.model.loading import ModelSource, build_critic, load_critic, read_model
from critic_train.model.memory import trade_memory
from critic_train.model.predicting import predict_values
from critic_train.model.presets import preset_config
from critic_train.model.saving import checkpoint_bytes
from critic_train.model.selfcheck import SAMPLED_ROLLOUTS, settle
from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import resolve_model
from critic_train.run.room import free_bytes
from critic_train.settings import FitSettings, column_renames
from critic_train.stopping import StopRequest
from critic_train.training.dataset import find_run_shards, limits_of
from critic_train.training.optimizer import build_optimizer
from critic_train.training.plan import make_plan
from critic_train.training.resuming import CACHED_BYTES_PER_TOKEN
from critic_train.training.step import LossRecipe, accumulate_gradient, apply_gradient
from critic_train.training.targets import Targets

TIMED_STEPS = 3
"""After one that warms up; their median counts."""
TIMED_TOKENS = 2
"""A timed step has about as many micro-batches."""
WEIGHT_BYTES = 4
"""Master weights, gradients and each of the two moments are float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What timed steps on the data at hand took.

    Attributes:
        train_seconds_a_token: forward and backward, for each token that goes through the model.
        predict_seconds_a_token: forward alone.
        optimizer_seconds: the clip and the step.
        peak_memory_bytes: the most memory held meanwhile.
    """

    train_seconds_a_token: float
    predict_seconds_a_token: float
    optimizer_seconds: float
    peak_memory_bytes: int


def dry_run(settings: FitSettings, out: Path, stop: StopRequest) -> Iterator[Event]:
    """Say what a run would take. Reads all rollouts, loads the model, takes a few steps, and leaves nothing behind.

    Args:
        settings: of the run.
        out: where it would go.
        stop: looked at between batches of rows and micro-batches.

    Yields:
        Progress and notices; RunEnded last, with the estimate.

    Raises:
        CriticTrainError: what would stop the run before its first step.
    """
    compute = resolve_compute(settings)
    shards = find_run_shards(settings)
    source = read_model(resolve_model(Path(settings.model))) if settings.model else None
    targets = Targets.of(settings)
    train = yield from _surveyed(settings, shards.data, source, targets, stop)
    held_out = None
    if shards.val_data and not stop.requested:
        held_out = yield from _surveyed(settings, shards.val_data, source, targets, stop)
    if stop.requested:
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)
        return
    groups = train.groups
    together = kept_together(groups, train.prompts)
    kept, held = split_groups(together, 0.0 if held_out else settings.val_fraction, settings.seed)
    plan = make_plan(settings, groups[kept])
    sample = train.sample.rollouts()
    assert sample is not None, "the reader raises where no row is good"
    critic = _critic(settings, source, train).to(compute.device)
    few = sample.take(np.arange(min(SAMPLED_ROLLOUTS, len(sample))))
    choice, said = settle(critic.train(), few, settings, compute)
    for sentence in said:
        yield Notice(message=sentence, level="warning")
    trade_memory(critic, settings)
    yield Progress(stage="timing steps", done=0, total=TIMED_STEPS, unit="steps")
    batch = targets.in_epoch(targets.on_reading(_few(sample, TIMED_TOKENS * compute.max_tokens)))
    pace = _timed(critic, batch, settings, compute, forest=choice.forest, stop=stop)
    if pace is None:
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)
        return
    computed_share = 1 - sharing(sample)["saved_share"] if choice.forest else 1.0
    computed = train.tokens * len(kept) / len(groups) * computed_share
    judged = (held_out.tokens if held_out else train.tokens * len(held) / len(groups)) * computed_share
    epochs = plan.total_steps / max(1, plan.steps_per_epoch[0])
    evaluations = -(-plan.total_steps // plan.eval_every) + 1 if judged else 0
    seconds = {
        "training": epochs * computed * pace.train_seconds_a_token + plan.total_steps * pace.optimizer_seconds,
        "evaluating": evaluations * judged * pace.predict_seconds_a_token,
    }
    parameters = sum(p.numel() for p in critic.parameters())
    yield RunEnded(
        status="finished",
        result={
            "status": "dry run",
            "out": str(out),
            "rollouts": len(kept),
            "held_out_rollouts": len(held) if held_out is None else len(held_out.groups),
            "tokens": int(train.tokens * len(kept) / len(groups)),
            "computed_tokens": int(computed),
            "steps": plan.total_steps,
            "epochs": epochs,
            "evaluations": evaluations,
            "parameters": parameters,
            "packing": "forest" if choice.forest else "rows",
            "device": str(compute.device),
            "memory": _memory(parameters, compute, pace),
            "disk": _disk(settings, critic, train, held_out, out),
            "seconds": {**seconds, "total": sum(seconds.values())},
            "tokens_per_second": 1 / (pace.train_seconds_a_token * computed_share),
        },
    )


def _surveyed(
    settings: FitSettings, files: list[Any], source: ModelSource | None, targets: Targets, stop: StopRequest
) -> Generator[Event, None, Survey]:
    reader = RolloutReader(
        files,
        renames=column_renames(settings.column),
        on_bad_rows=settings.on_bad_rows,
        on_bad_file=settings.on_bad_file,
        limits=limits_of(settings, source),
        needs=targets.needs,
        stop=stop,
    )
    survey, total = Survey(), sum(shard.num_rows for shard in files)
    for rollouts in reader:
        if stop.requested:
            break
        survey.add(rollouts)
        yield Progress(stage="reading rollouts", done=int(rollouts.row[-1]) + 1, total=total)
    for sentence in reader.notices:
        yield Notice(message=sentence)
    return survey


def _critic(settings: FitSettings, source: ModelSource | None, train: Survey) -> Critic:
    if source is not None:
        return load_critic(source)
    config = preset_config(settings.preset, max_token_id=train.max_token_id, max_length=train.longest)
    return build_critic(config, settings.seed)


def _few(sample: Rollouts, tokens: int) -> Rollouts:
    """The first rollouts of a sample, some thousand tokens of them; one at least."""
    enough = int(np.searchsorted(np.cumsum(sample.lengths), tokens, side="right"))
    return sample.take(np.arange(max(1, enough)))


def _timed(
    critic: Critic, batch: Rollouts, settings: FitSettings, compute: Compute, *, forest: bool, stop: StopRequest
) -> Pace | None:
    """Take steps on a copy of the run's critic that is thrown away; None when asked to stop."""
    recipe = LossRecipe(cliprange_value=None, mode="token-mean", scale_factor=None)
    optimizer = build_optimizer(critic.train(), lr=0.0, head_lr=0.0, weight_decay=0.0, kind=settings.optimizer)
    rows: list[tuple[float, float, float, int]] = []
    for _ in range(1 + TIMED_STEPS):
        began = _now(compute)
        result = accumulate_gradient(critic, batch, recipe, compute, forest=forest, stop=stop)
        if result is None:
            return None
        trained = _now(compute)
        apply_gradient(critic, optimizer, settings.grad_clip, result.value_loss)
        stepped = _now(compute)
        if predict_values(critic, batch, compute, forest=forest, stop=stop) is None:
            return None
        rows.append((trained - began, stepped - trained, _now(compute) - stepped, result.computed_tokens))
    # The first one allocates, and on CUDA compiles and tunes.
    train, step, predict, tokens = np.median(np.asarray(rows[1:]), axis=0).tolist()
    return Pace(
        train_seconds_a_token=train / tokens,
        predict_seconds_a_token=predict / tokens,
        optimizer_seconds=step,
        peak_memory_bytes=compute.peak_memory_bytes(),
    )


def _now(compute: Compute) -> float:
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)
    return time.perf_counter()


def _memory(parameters: int, compute: Compute, pace: Pace) -> dict[str, Any]:
    """Bytes. The peak was seen with all of these in place: the run's own will be close to it."""
    weights = parameters * WEIGHT_BYTES
    available = torch.cuda.get_device_properties(compute.device).total_memory if compute.device.type == "cuda" else None
    return {
        "weights": weights,
        "gradients": weights,
        "moments": 2 * weights,
        "peak": pace.peak_memory_bytes,
        "device": available,
    }


def _disk(settings: FitSettings, critic: Critic, train: Survey, held_out: Survey | None, out: Path) -> dict[str, int]:
    """Bytes. The best, the newest ones and the one being written stand at the same time."""
    checkpoint = checkpoint_bytes(critic)
    tokens = train.tokens + (held_out.tokens if held_out else 0)
    cache = CACHED_BYTES_PER_TOKEN * tokens
    return {
        "checkpoint": checkpoint,
        "cache": cache,
        "needed": checkpoint * (settings.keep + 2) + cache,
        "free": free_bytes(out.absolute()),
    }
