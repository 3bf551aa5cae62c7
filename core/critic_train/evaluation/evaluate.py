"""`--fail-under METRIC=VALUE` and `--fail-over`: the least and the most a figure of the verdict may be.

A metric is named by its keys in `eval --json`, joined by dots: `explained_variance`, `baselines.stored.mse`,
`critics.runs/a.auc_within_group`, `by.task.sum.explained_variance`. The bounds of an interval are `.low` and `.high`.

`critic-train eval`, from top to bottom: read, check, predict, judge.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from critic_train.data.addresses import UidLookup
from critic_train.data.bad_input import BadFiles
from critic_train.data.reading import Needs, RolloutReader, RowLimits
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
from critic_train.model.compute import Compute, resolve_compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import cost_of
from critic_train.model.loading import ModelSource
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import select_packing
from critic_train.model.sharded_loading import load_critic_on_ranks
from critic_train.predict.first_pass import critic_source, first_pass
from critic_train.rollouts import Rollouts
from critic_train.settings import EvalSettings, as_dict, column_renames, read_gate
from critic_train.stopping import StopRequest
from critic_train.versions import versions

UNDER, OVER = "--fail-under", "--fail-over"
BOUNDS = ("low", "high")
OF_THE_DATA = ("by", "monte_carlo", "rows_left_out", "files_left_out")
"""Keys below which the names depend on what was judged."""


def refuse_unknown(settings: EvalSettings, result: dict[str, Any]) -> None:
    """Refuse metrics that no verdict has, before anything is judged.

    Args:
        settings: with the gates.
        result: the result of a judgement of nothing, which has every key.

    Raises:
        ConfigError: a metric is unknown.
    """
    known = dict(_numbers(result, ""))
    wrong = []
    for flag, metric, _ in _gates(settings):
        depends = any(key in metric.split(".") for key in OF_THE_DATA)
        if metric not in known and not depends:
            # Near in spelling, or an interval without its bound.
            close = [f"{metric}.low"] if f"{metric}.low" in known else get_close_matches(metric, known, n=1)
            wrong.append(f"{flag}: no metric {metric!r}" + (f"; did you mean {close[0]}?" if close else ""))
    if wrong:
        hint = "metrics are named as in eval --json; docs/reference/metrics.md lists them"
        raise ConfigError("\n".join(wrong), hint=hint)


def judge_gates(settings: EvalSettings, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold a result against the gates.

    Args:
        settings: with the gates.
        result: what `--json` prints.

    Returns:
        {flag, metric, value, found, passed, reason} each; `reason` is a sentence where the gate failed, else None.
    """
    known = dict(_numbers(result, ""))
    gates = []
    for flag, metric, value in _gates(settings):
        found = known.get(metric)
        passed = found is not None and (found >= value if flag == UNDER else found <= value)
        reason = None
        if metric not in known:
            reason = f"{metric} does not exist in this verdict"
        elif found is None:
            reason = f"{metric} does not exist for these rollouts (null)"
        elif not passed:
            reason = f"{metric} is {found:.6g}, {'below' if flag == UNDER else 'above'} {value:g}"
        gates.append(
            {"flag": flag, "metric": metric, "value": value, "found": found, "passed": passed, "reason": reason}
        )
    return gates


def _gates(settings: EvalSettings) -> Iterator[tuple[str, str, float]]:
    """(flag, metric, value) of every gate."""
    for flag, pairs in ((UNDER, settings.evaluation.fail_under), (OVER, settings.evaluation.fail_over)):
        for pair in pairs:
            yield flag, *read_gate(pair)


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float | None]]:
    """Every number of a result and every figure that does not exist, by dotted name."""
    if path.endswith("interval"):
        for place, bound in enumerate(BOUNDS):
            yield f"{path}.{bound}", None if value is None else value[place]
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))


STORED = "stored"
"""The name under which the shards' own values are judged."""


def evaluate(settings: EvalSettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Judge critics, or the stored values, on rollouts. Streams: memory does not grow with the data.

    All rows are read and checked before any model runs, so that a bad row is reported at once. Several ranks read the
    same rows and share out what the models compute; rank 0 judges.

    Args:
        settings: what to judge and on what.
        stop: looked at between micro-batches and batches of rows.

    Yields:
        Progress and notices; RunEnded last, whose result is the verdict (see `Judge.verdict`) with the first
        critic's metrics at the top level, "data", "models", "words", "settings", "versions" and "gates" (see
        `judge_gates`) added, and "examples" (see `Examples.records`) where `settings.report` asks for a page.

    Raises:
        CriticTrainError: a fault that the user can mend.
    """
    stop = stop or StopRequest()
    with init_ranks(settings, nproc=settings.compute.nproc, device=settings.compute.device) as ranks:
        yield from _evaluate(settings, resolve_compute(settings.compute, ranks), ranks.agreed_stop(stop))


def _evaluate(settings: EvalSettings, compute: Compute, stop: StopRequest) -> Iterator[Event]:
    bad_files = BadFiles()
    shards = find_shards(settings.reading.data, bad_files)
    sources = {name: critic_source(Path(name)) for name in dict.fromkeys(settings.evaluation.model)}
    reader = _reader(settings, shards, bad_files, list(sources.values()), stop)
    names = list(sources) or [STORED]
    refuse_unknown(settings, _figures(names, Judge(names, by=settings.evaluation.by).verdict()))
    total = sum(shard.num_rows for shard in shards)
    found = yield from first_pass(reader, total, stop)
    if stop.requested:
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)
        return
    if not found.has_values and not sources:
        raise DataError(
            "the shards store no values, and no --model was given: there is nothing to judge",
            hint="--model RUN judges a critic; --column values=NAME reads stored values under another name",
        )
    if not found.has_values:
        yield Notice(message="the shards store no values: no clipped loss, no stored baseline")
    assert found.sample is not None, "the reader raises where no row is good"
    recipe = ReturnRecipe.of(settings.returns)
    uids = UidLookup(shards, column_renames(settings.reading.column), bad_files.by_name)
    judge = Judge(
        names,
        cliprange_value=settings.evaluation.cliprange_value,
        by=settings.evaluation.by,
        resamples=settings.evaluation.resamples,
        seed=settings.evaluation.seed,
        uids=uids,
        advantage=AdvantageRecipe.of(recipe),
    )
    examples = Examples(seed=settings.evaluation.seed, uids=uids) if settings.evaluation.report else None
    critics = {
        name: load_critic_on_ranks(source, compute).to(compute.device).eval() for name, source in sources.items()
    }
    if compute.ranks.size > 1 and critics:
        compute.pair_cost = cost_of(next(iter(critics.values()))).pair
    forest: dict[str, bool] = {}
    for name, critic in critics.items():
        choice, said = select_packing(critic, found.sample, settings.compute, compute)
        forest[name] = choice.forest
        for sentence in said:
            yield Notice(message=sentence, level="warning")
    for read in blocks(reader):
        batch = recipe.with_returns(read, read.values) if recipe.from_rewards else read
        values = _values(critics, batch, compute, forest, stop)
        if values is None or stop.requested:
            yield RunEnded(status="interrupted", signal_number=stop.signal_number)
            return
        if compute.ranks.is_main:
            judge.add(batch, values)
        if examples is not None and compute.ranks.is_main:
            examples.add(batch, values)
        if sentence := compute.lowered():
            yield Notice(message=sentence, level="warning")
        yield Progress(stage="evaluating", done=int(batch.row[-1]) + 1, total=total)
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
    lengths = [source.max_length for source in sources if source.max_length is not None]
    return RolloutReader(
        shards,
        renames=column_renames(settings.reading.column),
        on_bad_rows=settings.reading.on_bad_rows,
        on_bad_file=settings.reading.on_bad_file,
        bad_files=bad_files,
        limits=RowLimits(
            vocab_size=min((source.vocab_size for source in sources), default=None),
            max_length=min(lengths, default=None),
        ).at_most(settings.reading.max_length),
        labels=settings.evaluation.by or None,
        needs=Needs(
            returns=not recipe.from_rewards,
            values=recipe.uses_values,
            rewards="yes" if recipe.from_rewards else "where there",
            truncated=recipe.reads_truncated,
        ),
        drop_truncated=settings.returns.truncated == "drop",
        stop=stop,
    )


def _values(
    critics: dict[str, Critic], batch: Rollouts, compute: Compute, forest: dict[str, bool], stop: StopRequest
) -> dict[str, Any] | None:
    if not critics:
        return {STORED: batch.values}
    found: dict[str, Any] = {}
    for name, critic in critics.items():
        found[name] = predict_values(critic, batch, compute, forest=forest[name], stop=stop)
        if found[name] is None:
            return None
    return found


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
        "gates": judge_gates(settings, figures),
    }


def _figures(names: list[str], verdict: dict[str, Any]) -> dict[str, Any]:
    """The verdict, the first critic's figures at its top level."""
    return {**without_tables(verdict["critics"][names[0]]), **verdict}
