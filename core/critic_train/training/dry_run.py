"""`critic-train fit --dry-run`: what the run would take, from its data, its model and a few timed steps."""

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from critic_train.check.survey import Survey, sharing
from critic_train.data.order import connected_groups, split_groups
from critic_train.data.reading import RolloutReader
from critic_train.distributed.init import init_ranks
from critic_train.distributed.ranks import SINGLE_PROCESS
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.model.compute import Compute, resolve_compute, resolve_offload
from critic_train.model.critic import Critic
from critic_train.model.loading import ModelSource, read_model
from critic_train.model.memory import apply_memory_options
from critic_train.model.saving import checkpoint_bytes
from critic_train.model.selfcheck import SAMPLED_ROLLOUTS, select_packing
from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import resolve_model
from critic_train.run.storage import free_bytes
from critic_train.settings import FitSettings, column_renames, trained_layers
from critic_train.stopping import StopRequest
from critic_train.training.build import Shape, build_run_critic, to_device_or_shard
from critic_train.training.dataset import find_run_shards, limits_of
from critic_train.training.frozen_cache import ROW_BYTES, STATE_BYTES, not_kept, supports_cached_states
from critic_train.training.plan import make_plan
from critic_train.training.run_record import CACHED_BYTES_PER_TOKEN
from critic_train.training.step_timing import Layout, Pace, measure
from critic_train.training.targets import Targets

TIMED_TOKENS = 2
"""A timed step has about as many micro-batches."""
LAID_OUT_TOKENS = 2**18
"""Of the sample, laid out to see how many states will be kept."""
WEIGHT_BYTES = 4
"""Master weights and gradients are float32."""


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
    alone = nullcontext(SINGLE_PROCESS)
    offloads = resolve_offload(settings.compute) == "all"
    with init_ranks(settings, nproc=1, device=settings.compute.device, sharded=True) if offloads else alone as ranks:
        yield from _estimated(settings, out, resolve_compute(settings.compute, ranks), stop)


def _estimated(settings: FitSettings, out: Path, compute: Compute, stop: StopRequest) -> Iterator[Event]:
    shards = find_run_shards(settings)
    source = read_model(resolve_model(Path(settings.model.model))) if settings.model.model else None
    targets = Targets.of(settings)
    train = yield from _surveyed(settings, shards.data, source, targets, stop)
    held_out = None
    if shards.val_data and not stop.requested:
        held_out = yield from _surveyed(settings, shards.val_data, source, targets, stop)
    if stop.requested:
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)
        return
    groups = train.groups
    together = connected_groups(groups, train.prompts)
    kept, held = split_groups(together, 0.0 if held_out else settings.reading.val_fraction, settings.optimizer.seed)
    plan = make_plan(settings, groups[kept])
    sample = train.sample.rollouts()
    assert sample is not None, "the reader raises where no row is good"
    few = targets.in_epoch(targets.on_reading(_few(sample, TIMED_TOKENS * compute.max_tokens)))
    shape = Shape(
        max_token_id=train.max_token_id,
        max_length=train.longest,
        mean_return=float(few.returns[few.response_mask].mean()),
    )
    critic, compute = to_device_or_shard(build_run_critic(settings, source, None, compute, shape), compute)
    tried = sample.take(np.arange(min(SAMPLED_ROLLOUTS, len(sample))))
    choice, said = select_packing(critic, tried, settings.compute, compute)
    apply_memory_options(critic, settings.compute)
    layers = trained_layers(settings.model.train)
    keeps = layers is not None and supports_cached_states(critic, layers, tried, compute, forest=choice.forest)
    for sentence in [*said, *([] if keeps or layers is None else [not_kept(critic)])]:
        yield Notice(message=sentence, level="warning")
    pace = yield from measure(critic, few, settings, compute, forest=choice.forest, keeps_states=keeps, stop=stop)
    if pace is None:
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)
        return
    computed_share = 1 - sharing(sample)["saved_share"] if choice.forest else 1.0
    computed = train.tokens * len(kept) / len(groups) * computed_share
    judged = (held_out.tokens if held_out else train.tokens * len(held) / len(groups)) * computed_share
    epochs = plan.total_steps / max(1, plan.steps_per_epoch[0])
    evaluations = -(-plan.total_steps // plan.eval_every) + 1 if judged else 0
    seconds = {
        "keeping_states": (computed + judged) * pace.keep_seconds_a_token,
        "training": epochs * computed * pace.train_seconds_a_token + plan.total_steps * pace.optimizer_seconds,
        "evaluating": evaluations * judged * pace.predict_seconds_a_token,
    }
    tokens = train.tokens + (held_out.tokens if held_out else 0)
    states = _states_bytes(critic, sample, tokens, compute, forest=choice.forest) if keeps else 0
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
            "trained_parameters": _trained(critic),
            "packing": "forest" if choice.forest else "rows",
            "device": str(compute.device),
            "offload": compute.offload,
            "memory": _memory(critic, compute, pace),
            "disk": _disk(settings, critic, tokens, states, out),
            "seconds": {**seconds, "total": sum(seconds.values())},
            "tokens_per_second": 1 / (pace.train_seconds_a_token * computed_share),
        },
    )


def _surveyed(
    settings: FitSettings, files: list[Any], source: ModelSource | None, targets: Targets, stop: StopRequest
) -> Generator[Event, None, Survey]:
    reader = RolloutReader(
        files,
        renames=column_renames(settings.reading.column),
        on_bad_rows=settings.reading.on_bad_rows,
        on_bad_file=settings.reading.on_bad_file,
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


def _few(sample: Rollouts, tokens: int) -> Rollouts:
    """The first rollouts of a sample, some thousand tokens of them; one at least."""
    enough = int(np.searchsorted(np.cumsum(sample.lengths), tokens, side="right"))
    return sample.take(np.arange(max(1, enough)))


def _trained(critic: Critic) -> int:
    return sum(p.numel() for p in critic.parameters() if p.requires_grad)


def _memory(critic: Critic, compute: Compute, pace: Pace) -> dict[str, Any]:
    """Bytes. The peak was seen with all of these in place: the run's own will be close to it."""
    available = torch.cuda.get_device_properties(compute.device).total_memory if compute.device.type == "cuda" else None
    return {
        "weights": WEIGHT_BYTES * sum(p.numel() for p in critic.parameters()),
        "gradients": WEIGHT_BYTES * _trained(critic),
        "moments": pace.moment_bytes,
        "peak": pace.peak_memory_bytes,
        "device": available,
    }


def _states_bytes(critic: Critic, sample: Rollouts, tokens: int, compute: Compute, *, forest: bool) -> int:
    """Bytes of the kept states of some tokens, laid out as those of the sample are."""
    sample = _few(sample, LAID_OUT_TOKENS)
    layout = Layout.of(sample, compute, forest=forest)
    kept = layout.read_states if critic.last_layers is None else layout.computed_tokens
    width = int(critic.trunk.config.hidden_size)
    return round(tokens * (ROW_BYTES + STATE_BYTES * width * kept / len(sample.input_ids)))


def _disk(settings: FitSettings, critic: Critic, tokens: int, states: int, out: Path) -> dict[str, int]:
    """Bytes. The best, the newest ones and the one being written stand at the same time."""
    checkpoint = checkpoint_bytes(critic)
    cache = CACHED_BYTES_PER_TOKEN * tokens
    return {
        "checkpoint": checkpoint,
        "cache": cache,
        "states": states,
        "needed": checkpoint * (settings.run.keep + 2) + cache + states,
        "free": free_bytes(out.absolute()),
    }
