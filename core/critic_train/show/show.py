"""The command `show`: rollouts of a prompt group, or a text, token by token, with the value of each state."""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.addresses import addresses
from critic_train.data.bad_input import BadFiles
from critic_train.data.labels import uid_keys
from critic_train.data.reading import Needs, RolloutReader, RowLimits
from critic_train.data.returns import ReturnRecipe
from critic_train.data.scanning import SAMPLED_ROLLOUTS
from critic_train.data.shards import find_shards
from critic_train.errors import ConfigError, DataError, ModelError
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.report.rollout_pages import model_folders, token_texts, tokenizer_file
from critic_train.rollouts import Rollouts, concat_rollouts, rollouts_of_tokens
from critic_train.settings import ShowSettings, column_renames
from critic_train.stopping import Stopped, StopRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from critic_train.weights.loading import ModelSource

UIDS_NAMED, UIDS_LOOKED_AT = 5, 100
"""Of the data, where the one that was asked for is not in it; and rows they are taken from."""


def show(settings: ShowSettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Show rollouts or a text with the value of each state in which a token was chosen.

    Args:
        settings: what to show, and by which critic; the stored values without one.
        stop: checked between batches and micro-batches.

    Yields:
        Progress and notices; RunEnded last, whose result is {"status", "model", "rollouts": [...]}. A rollout has
        "uid", "file", "row" (None for a text), "of" (rollouts of its group), "mean_value", "mean_return"; and one entry
        a token: "input_ids", "texts", "response_mask", "values", "old_values" and "returns", of which the last three
        are None where there are none.

    Raises:
        CriticTrainError: an error that the user can mend.
    """
    stop = stop or StopRequest()
    source = _source(settings)
    tokenizer = _tokenizer(settings)
    try:
        if settings.shown.text:
            rollouts, origins, has_returns = _texts(settings, tokenizer, source), None, False
        else:
            rollouts, origins, has_returns = yield from _selected(settings, source, stop)
        values = rollouts.values
        if source is not None:
            values = yield from _values(settings, source, rollouts, stop)
    except Stopped:
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)
        return
    if values is None:
        raise DataError("the shards store no values, and no MODEL was given", hint="critic-train show MODEL --data ...")
    recipe = ReturnRecipe.of(settings.returns)
    if origins is not None and recipe.from_rewards:
        rollouts = recipe.with_returns(rollouts, rollouts.values if rollouts.values is not None else values)
    decode = None if tokenizer is None else lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))
    records = [
        _record(rollouts, number, values, decode, with_old=source is not None, with_returns=has_returns)
        for number in range(len(rollouts))
    ]
    for record, origin in zip(records, origins or [], strict=False):
        record.update(origin)
    model = None if source is None else str(source.path)
    yield RunEnded(status="finished", result={"status": "finished", "model": model, "rollouts": records})


def _source(settings: ShowSettings) -> "ModelSource | None":
    if not settings.shown.model:
        return None
    from critic_train.weights.first_pass import critic_source  # brings torch, for which stored values need not wait

    return critic_source(Path(settings.shown.model[0]))


def _tokenizer(settings: ShowSettings) -> "Tokenizer | None":
    """The one named, or the one beside the critic.

    Raises:
        ConfigError: the one named cannot be read, or a text is to be shown and there is none.
    """
    named = settings.shown.tokenizer
    folders = (
        [Path(named)] if named else [folder for name in settings.shown.model for folder in model_folders(Path(name))]
    )
    file = tokenizer_file(folders)
    if file is None:
        if named or settings.shown.text:
            where = f"in {named}" if named else f"beside {', '.join(settings.shown.model)}"
            raise ConfigError(f"no tokenizer.json {where}", hint="--tokenizer takes the directory of a model with one")
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"{file} is no tokenizer: {error}", hint="give another --tokenizer") from error


def _texts(settings: ShowSettings, tokenizer: "Tokenizer | None", source: "ModelSource | None") -> Rollouts:
    """--prompt and each --text as a rollout. Without a prompt the first token of the text has no state before it."""
    assert tokenizer is not None, "refused before"
    assert source is not None, "validated"
    prompt = list(tokenizer.encode(settings.shown.prompt).ids) if settings.shown.prompt else []
    sequences: list[list[int]] = []
    for text in settings.shown.text:
        ids = prompt + list(tokenizer.encode(text, add_special_tokens=not prompt).ids)
        if len(ids) <= max(1, len(prompt)):
            raise ConfigError(f"--text {text!r} has too few tokens: a value is read off the token before")
        if max(ids) >= source.vocab_size or len(ids) > (source.max_length or len(ids)):
            raise ConfigError(
                f"--text has {len(ids)} tokens, ids up to {max(ids)}: this model has positions for {source.max_length} "
                f"and a vocabulary of {source.vocab_size}",
                hint="is this its tokenizer?",
            )
        sequences.append(ids)
    return rollouts_of_tokens(sequences, [max(1, len(prompt))] * len(sequences))


def _selected(
    settings: ShowSettings, source: "ModelSource | None", stop: StopRequest
) -> Generator[Event, None, tuple[Rollouts, list[dict[str, Any]], bool]]:
    """The rollouts asked for, where each is from, and whether they have returns.

    Raises:
        DataError: none has such a uid.
    """
    reader = _reader(settings, source, stop)
    most, total = settings.shown.show, sum(shard.num_rows for shard in reader.shards)
    wanted = dict(zip(_keys(settings.shown.uid), settings.shown.uid, strict=True))
    counts: dict[int, int] = {}
    parts: list[Rollouts] = []
    for batch in reader:
        stop.check()
        chosen: list[int] = []
        for index, key in enumerate(batch.group.tolist()):
            if wanted and key not in wanted:
                continue
            counts[key] = counts.get(key, 0) + 1
            if counts[key] <= most if wanted else sum(map(len, parts)) + len(chosen) < most:
                chosen.append(index)
        if chosen:
            parts.append(batch.take(np.asarray(chosen, dtype=np.int64)))
        yield Progress(stage="reading rollouts", done=int(batch.row[-1]) + 1, total=total)
    for sentence in reader.notices:
        yield Notice(message=sentence)
    renames = column_renames(settings.reading.column)
    missing = [uid for key, uid in wanted.items() if key not in counts]
    if missing:
        raise _no_such_uid(missing, reader, renames)
    rollouts = concat_rollouts(parts)
    rollouts = rollouts.take(np.argsort(rollouts.group, kind="stable")) if wanted else rollouts
    origins = [
        {"uid": origin.uid or None, "file": origin.file, "row_group": origin.row_group, "row": origin.row}
        for origin in addresses(rollouts.row, reader.files_read, renames)
    ]
    for origin, key in zip(origins, rollouts.group.tolist(), strict=True):
        origin["of"] = counts[key]
    has_returns = ReturnRecipe.of(settings.returns).from_rewards or "returns" in reader.shared_columns
    return rollouts, origins, has_returns


def _reader(settings: ShowSettings, source: "ModelSource | None", stop: StopRequest) -> RolloutReader:
    recipe, reading, bad_files = ReturnRecipe.of(settings.returns), settings.reading, BadFiles()
    limits = RowLimits() if source is None else RowLimits(vocab_size=source.vocab_size, max_length=source.max_length)
    return RolloutReader(
        find_shards(reading.data, bad_files),
        renames=column_renames(reading.column),
        on_bad_rows=reading.on_bad_rows,
        on_bad_file=reading.on_bad_file,
        bad_files=bad_files,
        limits=limits.at_most(reading.max_length),
        needs=Needs(
            returns=False if recipe.from_rewards else "where there",
            values=recipe.uses_values or source is None,
            rewards="yes" if recipe.from_rewards else "no",
            truncated=recipe.reads_truncated,
        ),
        stop=stop,
    )


def _no_such_uid(missing: list[str], reader: RolloutReader, renames: dict[str, str]) -> DataError:
    """The error for uids that no rollout has; it names a few that there are."""
    total = sum(rows for _, rows in reader.files_read)
    origins = addresses(np.arange(min(UIDS_LOOKED_AT, total), dtype=np.int64), reader.files_read, renames)
    there = list(dict.fromkeys(origin.uid for origin in origins if origin.uid))[:UIDS_NAMED]
    hint = "these shards have no uid column; --column uid=NAME names it"
    if there:
        hint = f"uids there are {', '.join(there)}, ..."
    return DataError(f"no rollout has uid {', '.join(map(repr, missing))}", hint=hint)


def _keys(uids: Sequence[str]) -> list[int]:
    """The keys under which rollouts of these uids are grouped."""
    return uid_keys(pa.array(list(uids), type=pa.string()))[0].tolist() if uids else []


def _values(
    settings: ShowSettings, source: "ModelSource", rollouts: Rollouts, stop: StopRequest
) -> Generator[Event, None, NDArray[np.float32]]:
    """The critic's values, float32 [T]."""
    from critic_train.model.compute import resolve_compute
    from critic_train.model.microbatches import predict_with_progress
    from critic_train.model.selfcheck import select_packing
    from critic_train.weights.loading import load_critic

    yield Progress(stage="loading the model", done=0, total=0)
    compute = resolve_compute(settings.compute)
    critic = load_critic(source).to(compute.device).eval()
    sample = rollouts.take(np.append(np.arange(min(SAMPLED_ROLLOUTS, len(rollouts))), int(rollouts.lengths.argmax())))
    choice, sentences = select_packing(critic, sample, settings.compute, compute)
    for sentence in sentences:
        yield Notice(message=sentence, level="warning")
    values = yield from predict_with_progress(
        critic,
        rollouts,
        compute,
        forest=choice.forest,
        stop=stop,
        stage="valuing",
        before=0,
        total=len(rollouts),
    )
    if not np.isfinite(values).all():
        raise ModelError(f"{source.path} predicts NaN or infinite values", hint="--precision fp32 may help")
    return values


def _record(
    rollouts: Rollouts, number: int, values: NDArray[np.float32], decode: Any, *, with_old: bool, with_returns: bool
) -> dict[str, Any]:
    """One rollout, JSON-able; where it is from is filled in by the caller."""
    part = slice(int(rollouts.offsets[number]), int(rollouts.offsets[number + 1]))
    mask, ids = rollouts.response_mask[part], rollouts.input_ids[part].tolist()

    def listed(column: NDArray[np.float32] | None) -> list[float | None] | None:
        if column is None:
            return None
        return [float(f"{x:.6g}") if masked else None for x, masked in zip(column[part].tolist(), mask, strict=True)]

    returns = rollouts.returns if with_returns else None
    return {
        "uid": None,
        "file": None,
        "row": None,
        "of": 1,
        "mean_value": float(values[part][mask].mean(dtype=np.float64)),
        "mean_return": None if returns is None else float(returns[part][mask].mean(dtype=np.float64)),
        "input_ids": ids,
        "texts": token_texts(ids, decode),
        "response_mask": mask.tolist(),
        "values": listed(values),
        "old_values": listed(rollouts.values) if with_old else None,
        "returns": listed(returns),
    }
