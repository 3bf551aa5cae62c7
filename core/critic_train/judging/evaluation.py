"""`critic-train eval`, from top to bottom: read, check, predict, judge."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from critic_train.data.bad_files import BadFiles
from critic_train.data.blocks import blocks
from critic_train.data.reading import Needs, RolloutReader, RowLimits
from critic_train.data.shards import Shard, find_shards, fingerprint
from critic_train.data.uids import UidLookup
from critic_train.distributed.ranks import joined
from critic_train.errors import DataError
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.judging.advantages import AdvantageRecipe
from critic_train.judging.examples import Examples
from critic_train.judging.gates import judge_gates, refuse_unknown
from critic_train.judging.judge import Judge
from critic_train.judging.verdict import without_tables
from critic_train.judging.words import in_words
from critic_train.model.compute import Compute, resolve_compute
from critic_train.model.critic import Critic
from critic_train.model.loading import ModelSource, load_critic
from critic_train.model.predicting import predict_values
from critic_train.model.selfcheck import settle
from critic_train.predicting.first_pass import critic_source, first_pass
from critic_train.returns.recipe import ReturnRecipe
from critic_train.rollouts import Rollouts
from critic_train.settings import EvalSettings, as_dict, column_renames
from critic_train.stopping import StopRequest
from critic_train.versions import versions

STORED = "stored"
"""The name under which the shards' own values are judged."""


def evaluate(settings: EvalSettings, stop: StopRequest) -> Iterator[Event]:
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
    with joined(settings, nproc=settings.nproc, device=settings.device) as ranks:
        yield from _evaluate(settings, resolve_compute(settings, ranks), ranks.agreeing(stop))


def _evaluate(settings: EvalSettings, compute: Compute, stop: StopRequest) -> Iterator[Event]:
    bad_files = BadFiles()
    shards = find_shards(settings.data, bad_files)
    sources = {name: critic_source(Path(name)) for name in dict.fromkeys(settings.model)}
    reader = _reader(settings, shards, bad_files, list(sources.values()), stop)
    names = list(sources) or [STORED]
    refuse_unknown(settings, _figures(names, Judge(names, by=settings.by).verdict()))
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
    recipe = ReturnRecipe.of(settings)
    uids = UidLookup(shards, column_renames(settings.column), bad_files.found)
    judge = Judge(
        names,
        cliprange_value=settings.cliprange_value,
        by=settings.by,
        resamples=settings.resamples,
        seed=settings.seed,
        uids=uids,
        advantage=AdvantageRecipe.of(recipe),
    )
    examples = Examples(seed=settings.seed, uids=uids) if settings.report else None
    critics = {name: load_critic(source, compute).to(compute.device).eval() for name, source in sources.items()}
    if compute.ranks.size > 1 and critics:
        from critic_train.distributed.sharding import cost_of

        compute.pair_cost = cost_of(next(iter(critics.values()))).pair
    forest: dict[str, bool] = {}
    for name, critic in critics.items():
        choice, said = settle(critic, found.sample, settings, compute)
        forest[name] = choice.forest
        for sentence in said:
            yield Notice(message=sentence, level="warning")
    for read in blocks(reader):
        batch = recipe.with_returns(read, read.values) if recipe.from_rewards else read
        values = _values(critics, batch, compute, forest, stop)
        if values is None or stop.requested:
            yield RunEnded(status="interrupted", signal_number=stop.signal_number)
            return
        if compute.ranks.leads:
            judge.add(batch, values)
        if examples is not None and compute.ranks.leads:
            examples.add(batch, values)
        if sentence := compute.lowered():
            yield Notice(message=sentence, level="warning")
        yield Progress(stage="evaluating", done=int(batch.row[-1]) + 1, total=total)
    if not compute.ranks.leads:
        yield RunEnded(status="finished")
        return
    result = _result(settings, shards, names, judge, reader)
    if examples is not None:
        result["examples"] = examples.records()
    yield RunEnded(status="finished", result=result)


def _reader(
    settings: EvalSettings, shards: list[Shard], bad_files: BadFiles, sources: list[ModelSource], stop: StopRequest
) -> RolloutReader:
    recipe = ReturnRecipe.of(settings)
    lengths = [source.max_length for source in sources if source.max_length is not None]
    return RolloutReader(
        shards,
        renames=column_renames(settings.column),
        on_bad_rows=settings.on_bad_rows,
        on_bad_file=settings.on_bad_file,
        bad_files=bad_files,
        limits=RowLimits(
            vocab_size=min((source.vocab_size for source in sources), default=None),
            max_length=min(lengths, default=None),
        ).at_most(settings.max_length),
        labels=settings.by or None,
        needs=Needs(
            returns=not recipe.from_rewards,
            values=recipe.uses_values,
            rewards="yes" if recipe.from_rewards else "where there",
            truncated=recipe.reads_truncated,
        ),
        drop_truncated=settings.truncated == "drop",
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
        "data": settings.data,
        "data_digest": fingerprint(shards)["digest"],
        "models": settings.model,
        "rows_left_out": reader.bad_rows.summary(),
        "files_left_out": reader.bad_files.summary(),
        "words": in_words(verdict),
        "settings": as_dict(settings),
        "versions": versions(),
        "gates": judge_gates(settings, figures),
    }


def _figures(names: list[str], verdict: dict[str, Any]) -> dict[str, Any]:
    """The verdict, the first critic's figures at its top level."""
    return {**without_tables(verdict["critics"][names[0]]), **verdict}
