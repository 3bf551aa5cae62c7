"""`critic-train eval`: read, check, predict, judge, and compare the figures with the gates.

A gate is `--fail-under METRIC=VALUE` or `--fail-over`: the least or the most that a figure of the verdict may be. A
metric is named by its keys in `eval --json`, joined by dots: `explained_variance`, `baselines.stored.mse`,
`critics.runs/a.auc_within_group`, `by.task.sum.explained_variance`. The bounds of an interval are `.low` and `.high`.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from critic_train.data.addresses import UidLookup
from critic_train.data.bad_input import BadFiles
from critic_train.data.reading import Needs, RolloutReader
from critic_train.data.returns import ReturnRecipe
from critic_train.data.row_checks import RowLimits
from critic_train.data.scanning import blocks, first_pass
from critic_train.data.shards import Shard, find_shards, fingerprint
from critic_train.distributed.init import init_ranks
from critic_train.distributed.ranks import Ranks
from critic_train.errors import ConfigError, DataError
from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.caveats import PromptGroups, group_sentences, trained_on, trained_on_sentence
from critic_train.evaluation.examples import Examples
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.summary_text import summary_text
from critic_train.evaluation.verdict import without_tables
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.rollouts import Rollouts
from critic_train.run.manifest import versions
from critic_train.settings import EvalSettings, EvaluationSettings, as_dict, column_renames, read_gate
from critic_train.stopping import Stopped, StopRequest

if TYPE_CHECKING:
    from critic_train.evaluation.judged_critics import JudgedCritics

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
        critic's metrics at the top level, "data", "models", "groups" and "trained_on" (see `caveats`), "words",
        "settings", "versions" and "gates" (see `judge_gates`) added, and "examples" (see `Examples.records`) where
        `settings.report` asks for a page.

    Raises:
        CriticTrainError: a fault that the user can mend.
    """
    stop = stop or StopRequest()
    try:
        with init_ranks(settings, nproc=settings.compute.nproc, device=settings.compute.device, stop=stop) as ranks:
            stop = ranks.agreed_stop(stop)
            try:
                yield from _evaluate(settings, ranks, stop)
            except Stopped:
                yield RunEnded(status="interrupted", signal_number=stop.signal_number)
    except Stopped:  # while ranks were started
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)


def _evaluate(settings: EvalSettings, ranks: Ranks, stop: StopRequest) -> Iterator[Event]:
    options = settings.evaluation
    bad_files = BadFiles()
    shards = find_shards(settings.reading.data, bad_files)
    critics = _critics(settings, ranks, stop)
    names = list(critics.sources) if critics else [STORED]
    reader = _reader(settings, shards, bad_files, critics, stop)
    refuse_unknown(options, _figures(names, Judge(names, by=options.by).verdict()))
    total = sum(shard.num_rows for shard in shards)
    checked = yield from first_pass(reader, total, stop)
    if not checked.has_values and not critics:
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
    groups = PromptGroups()
    if critics:
        yield from critics.load(checked)
    for read in blocks(reader):
        batch = recipe.with_returns(read, read.values) if recipe.from_rewards else read
        stop.check()
        values = critics.values(batch) if critics else _stored(batch)
        if ranks.is_main:
            judge.add(batch, values)
            groups.add(batch)
            if examples is not None:
                examples.add(batch, values)
        for sentence in critics.lowered() if critics else ():
            yield Notice(message=sentence, level="warning")
        yield Progress(stage="evaluating", done=int(batch.row[-1]) + 1, total=total)
    stop.check()
    if not ranks.is_main:
        yield RunEnded(status="finished")
        return
    result = _result(settings, shards, names, judge, reader, groups.record())
    if examples is not None:
        result["examples"] = examples.records()
    yield RunEnded(status="finished", result=result)


def _stored(batch: Rollouts) -> dict[str, NDArray[np.float32]]:
    """The stored values, which the first pass found in every batch."""
    assert batch.values is not None
    return {STORED: batch.values}


def _critics(settings: EvalSettings, ranks: Ranks, stop: StopRequest) -> "JudgedCritics | None":
    """The critics of --model; None where stored values are judged: that needs neither torch nor transformers."""
    if not settings.evaluation.model:
        return None
    from critic_train.evaluation.judged_critics import JudgedCritics

    return JudgedCritics(settings.evaluation.model, settings.compute, ranks, stop)


def _reader(
    settings: EvalSettings,
    shards: list[Shard],
    bad_files: BadFiles,
    critics: "JudgedCritics | None",
    stop: StopRequest,
) -> RolloutReader:
    recipe = ReturnRecipe.of(settings.returns)
    return RolloutReader(
        shards,
        renames=column_renames(settings.reading.column),
        on_bad_rows=settings.reading.on_bad_rows,
        on_bad_file=settings.reading.on_bad_file,
        bad_files=bad_files,
        limits=(critics.limits() if critics else RowLimits()).at_most(settings.reading.max_length),
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


def _result(
    settings: EvalSettings,
    shards: list[Shard],
    names: list[str],
    judge: Judge,
    reader: RolloutReader,
    groups: dict[str, int],
) -> dict[str, Any]:
    verdict = judge.verdict()
    figures = _figures(names, verdict)
    data = fingerprint(shards)
    rows = sum(shard.num_rows for shard in shards)
    seen = {name: trained_on(Path(name), data["files"]) for name in dict.fromkeys(settings.evaluation.model)}
    caveats = [trained_on_sentence(name if len(seen) > 1 else "it", part, rows) for name, part in seen.items()]
    caveats += group_sentences(groups, verdict["rollouts"])
    return {
        **figures,
        "data": settings.reading.data,
        "data_digest": data["digest"],
        "models": settings.evaluation.model,
        "groups": groups,
        "trained_on": seen,
        "rows_left_out": reader.bad_rows.summary(),
        "files_left_out": reader.bad_files.summary(),
        "words": summary_text(verdict) + [sentence for sentence in caveats if sentence],
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
