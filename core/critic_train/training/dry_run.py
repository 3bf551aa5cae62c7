"""`critic-train fit --dry-run`: what the run would take, from its data, its model and a few timed steps."""

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.check.survey import Survey, sharing
from critic_train.data.order import connected_groups, split_groups
from critic_train.data.reading import RolloutReader
from critic_train.data.row_checks import RowLimits
from critic_train.data.scanning import SAMPLED_ROLLOUTS
from critic_train.distributed.init import init_ranks
from critic_train.distributed.ranks import SINGLE_PROCESS
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.model.automatic import average_bytes
from critic_train.model.compute import Compute, Keeping, resolve_compute, resolve_offload
from critic_train.model.critic import Critic
from critic_train.model.oom import activation_bytes
from critic_train.model.sequence_sharing import ranks_to_cut, refuse_rows, refuse_sequence_parallel
from critic_train.rollouts import Rollouts
from critic_train.run.storage import free_bytes
from critic_train.settings import ActivationCheckpointing, FitSettings, TrainReadingSettings, column_renames, offloads
from critic_train.stopping import Stopped, StopRequest
from critic_train.training.build import (
    PreparedCritic,
    build_run_critic,
    export_notice,
    prepare_critic,
    source_notices,
)
from critic_train.training.dataset import DataShape
from critic_train.training.frozen_cache import ROW_BYTES, STATE_BYTES
from critic_train.training.next_token_loss import NewHead
from critic_train.training.plan import TrainingPlan, make_plan
from critic_train.training.recipe import DataFacts, choice_notices, choose_recipe, with_recipe
from critic_train.training.run_shards import CACHED_BYTES_PER_TOKEN, RunShards, ShardSet, find_run_shards, row_limits
from critic_train.training.step_timing import Layout, StepTimes, time_steps
from critic_train.training.targets import Targets, choices_without_columns
from critic_train.weights.first_pass import read_base_model
from critic_train.weights.loading import ModelSource
from critic_train.weights.lora import adapter_notice
from critic_train.weights.saving import checkpoint_bytes

TIMED_TOKENS = 2
"""Tokens of a timed step, in token budgets: it has about as many micro-batches."""
LAID_OUT_TOKENS = 2**18
"""Tokens of the sample that are laid out to count the states that would be cached."""
WEIGHT_BYTES = 4
"""Master weights and gradients are float32."""


def dry_run(settings: FitSettings, out: Path, stop: StopRequest) -> Iterator[Event]:
    """Say what a run would take. Reads all rollouts, loads the model, takes a few steps, and leaves nothing behind.

    Args:
        settings: of the run.
        out: its run directory.
        stop: checked between batches of rows and micro-batches.

    Yields:
        Progress and notices; RunEnded last, with the estimate.

    Raises:
        CriticTrainError: what would stop the run before its first step.
    """
    single = nullcontext(SINGLE_PROCESS)
    on_host = offloads(resolve_offload(settings.compute), "all")
    with init_ranks(settings, nproc=1, device=settings.compute.device, sharded=True) if on_host else single as ranks:
        try:
            yield from _estimate(settings, out, resolve_compute(settings.compute, ranks), stop)
        except Stopped:
            yield RunEnded(status="interrupted", signal_number=stop.signal_number)


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedData:
    """The rollouts of a run, counted but not kept.

    Attributes:
        settings: with what the run chooses.
        train: all of --data.
        train_tokens: of the rollouts to train on; their number times the mean length of all.
        rollouts: number of rollouts to train on.
        held_out_rollouts: number of rollouts held out.
        held_out_tokens: of the rollouts held out.
        tokens: of all rollouts.
        response_ids: that occur in the responses of --data, int64, ascending.
        groups: the prompt groups to train on, int64.
        plan: the steps of the run.
    """

    settings: FitSettings
    train: Survey
    train_tokens: float
    rollouts: int
    held_out_rollouts: int
    held_out_tokens: float
    tokens: int
    response_ids: NDArray[np.int64]
    groups: NDArray[np.int64]
    plan: TrainingPlan


def _estimate(settings: FitSettings, out: Path, compute: Compute, stop: StopRequest) -> Iterator[Event]:
    refuse_sequence_parallel(settings.compute, settings.compute.nproc)
    shards = find_run_shards(settings.reading)
    source = read_base_model(settings.model, out, compute.ranks)
    settings = settings.replace(**(yield from choices_without_columns(settings, shards.train.shards)))
    targets = Targets.of(settings.returns, settings.loss)
    limits = row_limits(settings.reading.max_length, source)
    data = yield from _survey_data(settings, shards, limits, source, targets, stop)
    settings = data.settings
    compute.averages_weights = bool(settings.optimizer.ema_decay)
    sample = data.train.sample.rollouts()
    assert sample is not None, "the reader raises where no row is good"
    timed = targets.in_epoch(targets.on_reading(_first_tokens(sample, TIMED_TOKENS * compute.max_tokens)))
    trained_on = np.isin(sample.group, data.groups)
    shape = DataShape(
        max_token_id=data.train.max_token_id,
        max_length=data.train.longest,
        mean_return=_mean_return(sample.take(np.flatnonzero(trained_on)) if trained_on.any() else sample, targets),
    )
    yield from source_notices(source, settings, compute, shape, new=True)
    critic = build_run_critic(settings.model, source, None, compute, shape, settings.optimizer.seed)
    yield from [*export_notice(critic), *adapter_notice(critic)]
    tried = sample.take(np.append(np.arange(min(SAMPLED_ROLLOUTS, len(sample))), sample.lengths.argmax()))
    new_head = None
    if settings.loss.lm_loss_weight:
        new_head = NewHead(ids=data.response_ids, source=source, checkpoint=None, seed=0)
    prepared = prepare_critic(
        critic,
        compute,
        settings.compute,
        settings.model.train,
        settings.optimizer.optimizer,
        tried,
        lambda: tried,
        longest=shape.max_length,
        tokens=settings.optimizer.batch_size * shape.max_length,
        run_tokens=int(data.plan.passes * data.train_tokens),
        new_head=new_head,
    )
    compute = prepared.compute
    yield from prepared.notices
    if not prepared.forest:
        refuse_rows("", settings.compute)
    times = yield from time_steps(
        prepared.critic,
        timed,
        settings.optimizer,
        prepared.compute,
        forest=prepared.forest,
        caches_states=_keeps_states(prepared, data),
        stop=stop,
    )
    yield RunEnded(status="finished", result=_result(settings, out, data, sample, prepared, times))


def _survey_data(
    settings: FitSettings,
    shards: RunShards,
    limits: RowLimits,
    source: ModelSource | None,
    targets: Targets,
    stop: StopRequest,
) -> Generator[Event, None, SurveyedData]:
    seen = SeenIds()
    train = yield from _survey(settings.reading, shards.train, limits, targets, stop, seen)
    val = None
    if shards.val is not None:
        val = yield from _survey(settings.reading, shards.val, limits, targets, stop)
    groups = train.groups
    together = connected_groups(groups, train.prompts)
    chosen, held = split_groups(together, 0.0 if val else settings.reading.val_fraction, settings.optimizer.seed)
    # As the run does, of what it trains on; the ids alone are those of the held-out rollouts too.
    facts = DataFacts(int(train.response_counts[chosen].sum()), seen.ids)
    recipe = choose_recipe(settings, source, targets, lambda: facts)
    yield from choice_notices(settings, recipe)
    settings = with_recipe(settings, recipe)
    return SurveyedData(
        settings=settings,
        train=train,
        train_tokens=train.tokens * len(chosen) / len(groups),
        rollouts=len(chosen),
        held_out_rollouts=len(val.groups) if val else len(held),
        held_out_tokens=val.tokens if val else train.tokens * len(held) / len(groups),
        tokens=train.tokens + (val.tokens if val else 0),
        response_ids=seen.ids(),
        groups=np.unique(groups[chosen]),
        plan=make_plan(settings.optimizer, groups[chosen], settings.run.eval_every),
    )


class SeenIds:
    """The token ids that occur in responses."""

    def __init__(self) -> None:
        self._seen = np.zeros(0, dtype=np.bool_)

    def add(self, rollouts: Rollouts) -> None:
        """Add the ids of some rollouts' responses."""
        ids = rollouts.input_ids[rollouts.response_mask]
        self._seen = np.pad(self._seen, (0, max(0, int(ids.max(initial=-1)) + 1 - len(self._seen))))
        self._seen[ids] = True

    def ids(self) -> NDArray[np.int64]:
        """int64, ascending."""
        return np.flatnonzero(self._seen)


def _survey(
    settings: TrainReadingSettings,
    shard_set: ShardSet,
    limits: RowLimits,
    targets: Targets,
    stop: StopRequest,
    seen: SeenIds | None = None,
) -> Generator[Event, None, Survey]:
    reader = RolloutReader(
        shard_set.shards,
        renames=column_renames(settings.column),
        on_bad_rows=settings.on_bad_rows,
        on_bad_file=settings.on_bad_file,
        limits=limits,
        needs=targets.needs,
        group_by=settings.group_by,
        stop=stop,
    )
    survey, total = Survey(), shard_set.num_rows
    for rollouts in reader:
        stop.check()
        survey.add(rollouts)
        if seen:
            seen.add(rollouts)
        yield Progress(stage="reading rollouts", done=int(rollouts.row[-1]) + 1, total=total)
    stop.check()  # the reader ends early when asked to stop
    for sentence in reader.notices:
        yield Notice(message=sentence)
    return survey


def _mean_return(sample: Rollouts, targets: Targets) -> float:
    """Over the response tokens of a sample; it is that of the run where the sample is everything."""
    sample = targets.on_reading(sample)
    return float(sample.returns[sample.response_mask].mean(dtype=np.float64))


def _first_tokens(sample: Rollouts, tokens: int) -> Rollouts:
    """The first rollouts of a sample, of so many tokens at most; one at least."""
    count = int(np.searchsorted(np.cumsum(sample.lengths), tokens, side="right"))
    return sample.take(np.arange(max(1, count)))


def _result(
    settings: FitSettings, out: Path, data: SurveyedData, sample: Rollouts, prepared: PreparedCritic, times: StepTimes
) -> dict[str, Any]:
    """The estimate, as `--json` prints it."""
    critic, compute, plan = prepared.critic, prepared.compute, data.plan
    computed_share = 1 - sharing(sample)["saved_share"] if prepared.forest else 1.0
    computed = data.train_tokens * computed_share
    # Rollouts of one prompt that are shuffled apart are rarely in one mini-batch.
    trained_share = 1.0 if settings.optimizer.shuffle == "rollouts" else computed_share
    trained = data.train_tokens * trained_share
    held_out = data.held_out_tokens * computed_share
    epochs = plan.total_steps / plan.steps_per_epoch[0] if plan.steps_per_epoch else 0.0  # none: the head is solved
    evaluations = -(-plan.total_steps // plan.eval_every) + 1 if held_out else 0
    solving = computed * times.predict_seconds_per_token if settings.model.head_init == "exact" else 0.0
    seconds = {
        "solving_head": solving,
        "keeping_states": (computed + held_out) * times.cache_seconds_per_token,
        "training": epochs * trained * times.train_seconds_per_token + plan.total_steps * times.optimizer_seconds,
        "evaluating": evaluations * held_out * times.predict_seconds_per_token,
    }
    states = 0
    if _keeps_states(prepared, data):
        states = _states_bytes(critic, sample, data.tokens, compute, forest=prepared.forest)
    return {
        "status": "dry run",
        "out": str(out),
        "rollouts": data.rollouts,
        "held_out_rollouts": data.held_out_rollouts,
        "tokens": int(data.train_tokens),
        "computed_tokens": int(trained),
        "steps": plan.total_steps,
        "epochs": epochs,
        "evaluations": evaluations,
        "parameters": critic.num_parameters,
        "trained_parameters": _trained(critic),
        "packing": "forest" if prepared.forest else "rows",
        "device": str(compute.device),
        "offload": compute.offload,
        "memory": _memory(critic, compute, times) | _longest(settings, prepared, data.train.longest),
        "disk": _disk(critic, settings.run.keep, data.tokens, states, out, averaged=compute.averages_weights),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "tokens_per_second": 1 / (times.train_seconds_per_token * trained_share),
    }


def _keeps_states(prepared: PreparedCritic, data: SurveyedData) -> bool:
    """Whether the run keeps a frozen trunk's states, as `build_trainer` has it."""
    return prepared.caches_states and data.plan.total_steps > 0


def _trained(critic: Critic) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in critic.parameters() if p.requires_grad)


def _memory(critic: Critic, compute: Compute, times: StepTimes) -> dict[str, Any]:
    """Bytes. The peak was measured with all of these in memory: the run's own will be close to it."""
    available = torch.cuda.get_device_properties(compute.device).total_memory if compute.device.type == "cuda" else None
    return {
        "weights": WEIGHT_BYTES * sum(p.numel() for p in critic.parameters()),
        "gradients": WEIGHT_BYTES * _trained(critic),
        "moments": times.moment_bytes,
        "average": average_bytes(critic, compute),
        "peak": times.peak_memory_bytes,
        "device": available,
    }


def _longest(settings: FitSettings, prepared: PreparedCritic, tokens: int) -> dict[str, Any]:
    """What the longest rollout keeps for its backward pass on a rank, in bytes, in each way of keeping less."""
    critic, compute, size = prepared.critic, prepared.compute, settings.compute.nproc
    on_cuda = compute.device.type == "cuda"
    cut, reason = ranks_to_cut(settings.compute, size, tokens, compute.max_tokens, measured=on_cuda)
    cut = cut if prepared.forest else 1

    def held(number: int, keeping: Keeping) -> int:
        return activation_bytes(critic.trunk, -(-tokens // number), compute, keeping, number)

    kinds: tuple[ActivationCheckpointing, ...] = ("none", "tiles", "layer", "layer-tiles")
    activations = {kind: held(cut, Keeping(kind)) for kind in kinds}
    needed: dict[str, Any] = {
        "activations": {**activations, "layer-tiles, --offload activations": held(cut, Keeping("layer-tiles", True))},
        "ranks": size,
        "sequence_parallel": cut,
    }
    if prepared.forest:
        numbers = [n for n in range(2, size + 1) if size % n == 0] if size > 1 else [2, 4, 8]
        needed["by_sequence_parallel"] = {str(n): held(n, compute.keeping) for n in [1, *numbers]}
        if tokens > cut * compute.max_tokens and (settings.compute.max_tokens or on_cuda):
            needed["sequence_parallel_needed"] = 2 ** (-(-tokens // compute.max_tokens) - 1).bit_length()
    if cut > 1:
        needed["sequence_parallel_reason"] = reason
    return {"longest_rollout": tokens, "keeping": str(compute.keeping), **needed}


def _states_bytes(critic: Critic, sample: Rollouts, tokens: int, compute: Compute, *, forest: bool) -> int:
    """Bytes of the cached states of so many tokens, laid out as those of the sample are."""
    sample = _first_tokens(sample, LAID_OUT_TOKENS)
    layout = Layout.of(sample, compute, forest=forest)
    cached = layout.read_states if critic.last_layers is None else layout.computed_tokens
    width = int(critic.trunk.config.hidden_size)
    return round(tokens * (ROW_BYTES + STATE_BYTES * width * cached / len(sample.input_ids)))


def _disk(critic: Critic, keep: int, tokens: int, states: int, out: Path, *, averaged: bool) -> dict[str, int]:
    """Bytes. The best checkpoint, the newest ones and the one being written exist at the same time."""
    checkpoint = checkpoint_bytes(critic, averaged=averaged)
    cache = CACHED_BYTES_PER_TOKEN * tokens
    return {
        "checkpoint": checkpoint,
        "cache": cache,
        "states": states,
        "needed": checkpoint * (keep + 2) + cache + states,
        "free": free_bytes(out.absolute()),
    }
