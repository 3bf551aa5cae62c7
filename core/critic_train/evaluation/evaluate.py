"""`critic-train eval`: read, check, predict, judge, and compare the figures with the gates.

A gate is `--fail-under METRIC=VALUE` or `--fail-over`: the least or the most that a figure of the verdict may be. A
metric is named by its keys in `eval --json`, joined by dots: `explained_variance`, `baselines.stored.mse`,
`critics.runs/a.auc_within_group`, `by.task.sum.explained_variance`. The bounds of an interval are `.low` and `.high`.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from critic_train.data.addresses import UidLookup
from critic_train.data.bad_input import BadFiles
from critic_train.data.reading import Needs, RolloutReader
from critic_train.data.returns import ReturnRecipe
from critic_train.data.scanning import blocks
from critic_train.data.shards import Shard, find_shards, fingerprint
from critic_train.distributed.init import init_ranks
from critic_train.errors import ConfigError, DataError
from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.examples import Examples
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.summary_text import summary_text
from critic_train.evaluation.verdict import without_tables
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.model.automatic import choose_tokens
from critic_train.model.compute import Compute, resolve_compute
from critic_train.model.critic import Critic
from critic_train.model.first_pass import FirstPass, critic_source, first_pass, limits_of
from critic_train.model.fsdp import cost_of
from critic_train.model.loading import ModelSource
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import select_packing
from critic_train.model.sharded_loading import load_critic_on_ranks
from critic_train.rollouts import Rollouts
from critic_train.run.manifest import versions
from critic_train.settings import ComputeSettings, EvalSettings, EvaluationSettings, as_dict, column_renames, read_gate
from critic_train.stopping import Stopped, StopRequest

UNDER, OVER = "--fail-under", "--fail-over"
BOUNDS = ("low", "high")
DATA_DEPENDENT = ("by", "monte_carlo", "rows_left_out", "files_left_out")
"""Keys below which the names depend on the rollouts."""

ADVICE = {
    "returns": "--returns mc makes Monte-Carlo returns of a column `reward` or `rewards`",
    "values": "--returns mc needs none",
}
"""What to do where the shards lack a column."""
STORED = "stored"
"""The name under which the shards' own values are judged."""


def evaluate(settings: EvalSettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Judge critics, or the stored values, on rollouts. Streams: memory does not grow with the data.

    All rows are read and checked before any model runs, so that a bad row is reported at once. Several ranks read the
    same rows and share out what the models compute; rank 0 judges.

    Args:
        settings: what to judge and on what.
        stop: checked between micro-batches and batches of rows.

    Yields:
        Progress and notices; RunEnded last, whose result is the verdict (see `Judge.verdict`) with the first
        critic's metrics at the top level, "data", "models", "words", "settings", "versions" and "gates" (see
        `judge_gates`) added, and "examples" (see `Examples.records`) where `settings.report` asks for a page.

    Raises:
        CriticTrainError: a fault that the user can mend.
    """
    stop = stop or StopRequest()
    try:
        with init_ranks(settings, nproc=settings.compute.nproc, device=settings.compute.device, stop=stop) as ranks:
            stop = ranks.agreed_stop(stop)
            try:
                yield from _evaluate(settings, resolve_compute(settings.compute, ranks), stop)
            except Stopped:
                yield RunEnded(status="interrupted", signal_number=stop.signal_number)
    except Stopped:  # while ranks were started
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)


def _evaluate(settings: EvalSettings, compute: Compute, stop: StopRequest) -> Iterator[Event]:
    options = settings.evaluation
    bad_files = BadFiles()
    shards = find_shards(settings.reading.data, bad_files)
    sources = {name: critic_source(Path(name)) for name in dict.fromkeys(options.model)}
    reader = _reader(settings, shards, bad_files, list(sources.values()), stop)
    names = list(sources) or [STORED]
    refuse_unknown(options, _figures(names, Judge(names, by=options.by).verdict()))
    total = sum(shard.num_rows for shard in shards)
    checked = yield from first_pass(reader, total, stop)
    if not checked.has_values and not sources:
        raise DataError(
            "the shards store no values, and no --model was given: there is nothing to judge",
            hint="--model RUN judges a critic; --column values=NAME reads stored values under another name",
        )
    if not checked.has_values:
        yield Notice(message="the shards store no values: no clipped loss, no stored baseline")
    recipe = ReturnRecipe.of(settings.returns)
    uids = UidLookup(shards, column_renames(settings.reading.column), bad_files.by_name)
    judge = Judge(
        names,
        cliprange_value=options.cliprange_value,
        by=options.by,
        resamples=options.resamples,
        seed=options.seed,
        uids=uids,
        advantage=AdvantageRecipe.of(recipe),
    )
    examples = Examples(seed=options.seed, uids=uids) if options.report else None
    critics = yield from _load_critics(sources, checked, settings.compute, compute)
    for read in blocks(reader):
        batch = recipe.with_returns(read, read.values) if recipe.from_rewards else read
        values = _values(critics, batch, stop)
        if compute.ranks.is_main:
            judge.add(batch, values)
            if examples is not None:
                examples.add(batch, values)
        for loaded in critics.values():
            if sentence := loaded.compute.lowered():
                yield Notice(message=sentence, level="warning")
        yield Progress(stage="evaluating", done=int(batch.row[-1]) + 1, total=total)
    stop.check()
    if not compute.ranks.is_main:
        yield RunEnded(status="finished")
        return
    result = _result(settings, shards, names, judge, reader)
    if examples is not None:
        result["examples"] = examples.records()
    yield RunEnded(status="finished", result=result)


def _reader(
    settings: EvalSettings, shards: list[Shard], bad_files: BadFiles, sources: list[ModelSource], stop: StopRequest
) -> RolloutReader:
    recipe = ReturnRecipe.of(settings.returns)
    return RolloutReader(
        shards,
        renames=column_renames(settings.reading.column),
        on_bad_rows=settings.reading.on_bad_rows,
        on_bad_file=settings.reading.on_bad_file,
        bad_files=bad_files,
        limits=limits_of(sources).at_most(settings.reading.max_length),
        labels=settings.evaluation.by or None,
        needs=Needs(
            returns=not recipe.from_rewards,
            values=recipe.uses_values,
            rewards="yes" if recipe.from_rewards else "where there",
            truncated=recipe.reads_truncated,
            advice=ADVICE,
            every_rename=True,
        ),
        drop_truncated=settings.returns.truncated == "drop",
        group_by=settings.reading.group_by,
        stop=stop,
    )


@dataclass(frozen=True, slots=True)
class _LoadedCritic:
    """A critic on its device, how it computes, and whether its rollouts are laid out as prefix trees."""

    critic: Critic
    compute: Compute
    forest: bool


def _load_critics(
    sources: dict[str, ModelSource], checked: FirstPass, settings: ComputeSettings, compute: Compute
) -> Generator[Event, None, dict[str, _LoadedCritic]]:
    """Load the critics and choose the packing of each, by the self-check on a few rollouts."""
    for source in sources.values():
        yield from source.notices
    critics = {
        name: load_critic_on_ranks(source, compute).to(compute.device).eval() for name, source in sources.items()
    }
    if compute.ranks.size > 1 and critics:
        compute.pair_cost = cost_of(next(iter(critics.values()))).pair
    loaded = {}
    assert checked.sample is not None, "the reader raises where no row is good"
    for name, critic in critics.items():
        own = replace(compute)  # critics of several architectures may need several kernels
        choice, warnings = select_packing(critic, checked.sample, settings, own, tokens=checked.tokens)
        loaded[name] = _LoadedCritic(critic, own, choice.forest)
        for sentence in warnings:
            yield Notice(message=sentence, level="warning")
    if settings.max_tokens is None and compute.device.type == "cuda":
        # Of several critics the largest decides: they take turns with the same batches.
        for each in loaded.values():
            choose_tokens(each.critic, each.compute, forest=each.forest, largest=checked.sample)
        budget = min(each.compute.max_tokens for each in loaded.values())
        for each in loaded.values():
            each.compute.start_at(budget)
    return loaded


def _values(critics: dict[str, _LoadedCritic], batch: Rollouts, stop: StopRequest) -> dict[str, Any]:
    """Critic -> its values of a batch, float32 [T]; the stored values where there are no critics."""
    stop.check()
    if not critics:
        return {STORED: batch.values}
    values: dict[str, Any] = {}
    for name, loaded in critics.items():
        values[name] = predict_values(loaded.critic, batch, loaded.compute, forest=loaded.forest, stop=stop)
        if values[name] is None:
            raise Stopped
    stop.check()
    return values


def _result(
    settings: EvalSettings, shards: list[Shard], names: list[str], judge: Judge, reader: RolloutReader
) -> dict[str, Any]:
    verdict = judge.verdict()
    figures = _figures(names, verdict)
    return {
        **figures,
        "data": settings.reading.data,
        "data_digest": fingerprint(shards)["digest"],
        "models": settings.evaluation.model,
        "rows_left_out": reader.bad_rows.summary(),
        "files_left_out": reader.bad_files.summary(),
        "words": summary_text(verdict),
        "settings": as_dict(settings),
        "versions": versions(),
        "gates": judge_gates(settings.evaluation, figures),
    }


def _figures(names: list[str], verdict: dict[str, Any]) -> dict[str, Any]:
    """The verdict, the first critic's figures at its top level."""
    return {**without_tables(verdict["critics"][names[0]]), **verdict}


def refuse_unknown(options: EvaluationSettings, result: dict[str, Any]) -> None:
    """Refuse gates on metrics that no verdict has, before anything is judged.

    Args:
        options: with the gates.
        result: the result of a judgement of nothing, which has every key.

    Raises:
        ConfigError: a metric is unknown.
    """
    figures = dict(_numbers(result, ""))
    errors = []
    for flag, metric, _ in _gates(options):
        if metric in figures or any(key in metric.split(".") for key in DATA_DEPENDENT):
            continue
        # Near in spelling, or an interval without its bound.
        close = [f"{metric}.low"] if f"{metric}.low" in figures else get_close_matches(metric, figures, n=1)
        errors.append(f"{flag}: no metric {metric!r}" + (f"; did you mean {close[0]}?" if close else ""))
    if errors:
        hint = "metrics are named as in eval --json; docs/reference/metrics.md lists them"
        raise ConfigError("\n".join(errors), hint=hint)


def judge_gates(options: EvaluationSettings, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare a result with the gates.

    Args:
        options: with the gates.
        result: what `--json` prints.

    Returns:
        {flag, metric, value, found, passed, reason} each; `found` is the figure, `reason` is a sentence where the gate
        failed, else None.
    """
    figures = dict(_numbers(result, ""))
    gates = []
    for flag, metric, value in _gates(options):
        figure = figures.get(metric)
        passed = figure is not None and (figure >= value if flag == UNDER else figure <= value)
        reason = None
        if metric not in figures:
            reason = f"{metric} does not exist in this verdict"
        elif figure is None:
            reason = f"{metric} does not exist for these rollouts (null)"
        elif not passed:
            reason = f"{metric} is {figure:.6g}, {'below' if flag == UNDER else 'above'} {value:g}"
        gates.append(
            {"flag": flag, "metric": metric, "value": value, "found": figure, "passed": passed, "reason": reason}
        )
    return gates


def _gates(options: EvaluationSettings) -> Iterator[tuple[str, str, float]]:
    """(flag, metric, value) of every gate."""
    for flag, pairs in ((UNDER, options.fail_under), (OVER, options.fail_over)):
        for pair in pairs:
            yield flag, *read_gate(pair)


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float | None]]:
    """Every number of a result and every figure that does not exist, by dotted name."""
    if path.endswith("interval"):
        for index, bound in enumerate(BOUNDS):
            yield f"{path}.{bound}", None if value is None else value[index]
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
