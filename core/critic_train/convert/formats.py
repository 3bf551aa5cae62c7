"""Which format a file is in, and its records.

A format of pickled objects or of JSON Lines is declared in its own module and listed in FORMATS. Token ids and text in
JSON Lines or Parquet are read here, whatever wrote them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from critic_train.convert import nemo_rl, openrlhf, skyrl, slime, step_labels, text_records, trajectory_values, verl
from critic_train.convert.chat import Retokenizer
from critic_train.convert.dump_files import Source
from critic_train.convert.dump_tensors import RefusedError
from critic_train.convert.field_values import (
    PAIR,
    Fields,
    carriers_of,
    flat,
    is_scored_pair,
    of_whole_record,
    samples_of,
)
from critic_train.convert.fields import Reading, UnclearError, read_fields
from critic_train.convert.json_records import FIRST_RECORDS, first_records, record_chunks
from critic_train.convert.raw_records import Line, LineFormat, ObjectFormat, Records, Rows
from critic_train.convert.rewards import reward_fields, trl_reward, verl_reward
from critic_train.convert.unpickle import load_dump
from critic_train.data.decoding import damaged, pieces, refuse_oversized_rows
from critic_train.data.schema import ALIASES
from critic_train.data.shards import Shard, find_shards
from critic_train.errors import ConfigError, DataError

Format = TypeVar("Format", ObjectFormat, LineFormat)
FORMATS: tuple[ObjectFormat | LineFormat, ...] = (
    slime.FORMAT, verl.FORMAT, nemo_rl.FORMAT, trajectory_values.FORMAT, openrlhf.FORMAT, skyrl.FORMAT,
    step_labels.FORMAT,
)  # fmt: skip
"""Recognised in this order."""
TOKENS = "token ids"
FORMAT_NAMES = tuple(dict.fromkeys((*(one.name for one in FORMATS), *text_records.KINDS, "tokens")))
"""The values of --from."""
TITLES = ", ".join((*(one.title for one in FORMATS), text_records.TITLE))
SHOWN_FIELDS = 12
SAMPLES_SEEN = 256
"""From so many samples, at most, it is concluded which field is which."""
ARROW_ROWS = 1024
"""Rows of an Arrow file that are read at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How sources are read.

    Attributes:
        format: --from, None where formats are recognised.
        renames: canonical name -> the source's column, from --column.
        retokenizer: makes token ids of text, None without --tokenizer.
        allow_retokenize: whether text may be read.
        apply_chat_template: whether prompts of text go through the chat template.
        group_by: --group-by.
    """

    format: str | None
    renames: dict[str, str] = field(default_factory=dict)
    retokenizer: Retokenizer | None = None
    allow_retokenize: bool = False
    apply_chat_template: bool = False
    group_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A source whose format is recognised.

    Attributes:
        format: what it is called in messages.
        records: pieces of it, each with how many bytes or rows are done.
        total, unit: of what `records` counts.
        in_memory: whether all of it is in memory at once, so that prompt groups can be put together.
        row_unit: what a record's number counts.
        renames: canonical name -> the column of `records` that is it, where that has another name.
        understood: prompt, response, reward, ... -> what is read as that, in words, where the columns do not tell.
    """

    format: str
    records: Iterator[tuple[Records, int]]
    total: int
    unit: str
    in_memory: bool = False
    row_unit: str = "row"
    renames: dict[str, str] = field(default_factory=dict)
    understood: dict[str, str] = field(default_factory=dict)


def open_source(source: Source, options: Options) -> Opened:
    """Recognise a source's format, or check that it is in that of --from.

    Raises:
        DataError: it is in no known format, or not in that of --from; it is damaged, or would run code.
        ConfigError: it is text, and that was not allowed.
    """
    with source.path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise DataError(f"{source.name}: the file is empty (0 bytes)")
    if head == b"PAR1" or source.path.suffix == ".arrow":
        return _open_table(source, options)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _open_pickle(source, options)
    return _open_text_file(source, options)


def _open_pickle(source: Source, options: Options) -> Opened:
    content = load_dump(source.path, source.name)
    recognised = _recognise(content, ObjectFormat, options)
    if recognised is None:
        raise _unknown(source, options, _shape_of(content))
    kind, one = recognised
    size = source.path.stat().st_size
    records = ((records, size) for records in _with_name(one.read(content), source))
    text_names = [name for name in ("messages", "prompt", "response") if name in options.renames]
    if text_names:
        name = text_names[0]
        raise DataError(
            f"{source.name}: --column {name}={options.renames[name]} has no effect: {kind} holds token ids",
            hint=f"canonical columns: {', '.join(ALIASES)}",
        )
    return Opened(
        format=kind,
        records=records,
        total=size,
        unit="bytes",
        in_memory=True,
        row_unit="sample",
        renames=options.renames,
    )


def _recognise(content: Any, of: type[Format], options: Options) -> tuple[str, Format] | None:
    """The first format that takes an object, or the first one of a file, and what it calls it."""
    for one in FORMATS:
        if isinstance(one, of) and options.format in (None, one.name):
            kind = one.recognise(content)
            if kind is not None:
                return kind, one
    return None


def _with_name(records: Iterator[Records], source: Source) -> Iterator[Records]:
    """Puts the file's name before the errors of a format."""
    try:
        yield from records
    except RefusedError as refusal:
        raise DataError(f"{source.name}: {refusal.message}", hint=refusal.hint) from None
    except DataError as error:
        raise DataError(f"{source.name}: {error.message}", hint=error.hint) from None


def _open_text_file(source: Source, options: Options) -> Opened:
    first = first_records(source.path)
    if not first:
        raise _unknown(source, options, "it begins with no JSON object")
    kind, read, renames = _reader(first, source, options)

    def records() -> Iterator[tuple[Records, int]]:
        for good, bad, done in record_chunks(source.path):
            chunk = read(good)
            all_bad = tuple(sorted((*chunk.bad, *bad), key=lambda record: record.row))
            yield replace(chunk, bad=all_bad), done

    total = source.path.stat().st_size
    return Opened(
        format=kind, records=records(), total=total, unit="bytes", row_unit="record", renames=renames.columns,
        understood=renames.understood,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Understood:
    """Canonical name -> column of the records that are read, and what was understood, in words."""

    columns: dict[str, str]
    understood: dict[str, str] = field(default_factory=dict)


def _reader(
    first: list[Fields], source: Source, options: Options
) -> tuple[str, Callable[[list[Line]], Records], _Understood]:
    """How the records of a file are read: (kind, reader, what was understood).

    Raises:
        DataError: they cannot be, or in two ways.
        ConfigError: they are text, and that was not allowed.
    """
    recognised = _recognise(first[0], LineFormat, options)
    if recognised is not None:
        kind, one = recognised
        retokenizer = _retokenizer(source, kind, options) if one.is_text else None
        return kind, lambda lines: one.read(lines, source.path.name, retokenizer), _Understood(columns=options.renames)
    kind = text_records.kind_of(name for record in first for name in record)
    try:
        carriers, reading = choose_reading(first, options.renames, kind)
    except DataError as error:
        between = " " if error.message.startswith("is ") else ": "
        raise DataError(f"{source.name}{between}{error.message}", hint=error.hint) from None
    _hold_to_format(source, options, TOKENS if reading.is_tokens else kind, first)
    if reading.is_tokens and _stands_in_columns(reading, carriers):
        columns = {name: column for name, column in reading.parts.items() if column not in _names_of(name)}
        if reading.reward is not None and reading.reward.names[0] not in _names_of("reward", "rewards"):
            columns["reward"] = reading.reward.names[0]
        return TOKENS, _as_columns, _Understood(columns=columns | options.renames)
    record_reader = text_records.RecordReader(
        reading=reading,
        carriers=carriers,
        renames=options.renames,
        kind=kind,
        retokenizer=None if reading.is_tokens else _retokenizer(source, kind, options),
        apply_chat_template=options.apply_chat_template,
    )
    kind = TOKENS if reading.is_tokens else kind
    return kind, record_reader, _Understood(columns={}, understood=_in_words(reading, carriers, record_reader, first))


def _in_words(
    reading: Reading, carriers: tuple[str, ...], reader: text_records.RecordReader, first: list[Fields]
) -> dict[str, str]:
    """What was understood, with how several samples stand in a record, and whether texts go through a template."""
    words = dict(reading.understood)
    if carriers:
        words["samples"] = " and ".join(f"`{name}`" for name in (carriers if carriers == PAIR else carriers[-1:]))
    retokenizer = reader.retokenizer
    if retokenizer is not None:
        words["mask"] = "what the policy wrote"
    if (
        retokenizer is not None
        and retokenizer.has_template
        and "prompt" in reading.parts
        and not reader.apply_chat_template
    ):
        prompts = [flat.get(reading.parts["prompt"]) for record in first for flat in samples_of(record, carriers)]
        if not any(
            isinstance(text, list) or (isinstance(text, str) and retokenizer.is_templated(text)) for text in prompts
        ):
            words["chat template"] = "none, prompt and response are joined as they are (--apply-chat-template uses it)"
    return words


def _stands_in_columns(reading: Reading, carriers: tuple[str, ...]) -> bool:
    """Whether token ids and rewards are read as they are, each in a column of its own."""
    names = [*reading.parts.values(), *(reading.reward.names if reading.reward else ())]
    is_plain = reading.reward is None or (len(reading.reward.names) == 1 and not reading.reward.is_text)
    return (
        not carriers and is_plain and "response_length" not in reading.parts and not any("." in name for name in names)
    )


def _names_of(*canonical: str) -> set[str]:
    return {name for one in canonical for name in (one, *ALIASES[one])}


def choose_reading(first: list[Fields], renames: dict[str, str], kind: str) -> tuple[tuple[str, ...], Reading]:
    """The fields that hold several samples, and which field is what.

    A record is a sample, or it holds several in one of its fields, or in a field of these. A reading is possible where
    all that a rollout needs is in it, the response in what was taken apart.

    Raises:
        UnclearError: no reading is possible, or several are.
    """
    possible: list[tuple[tuple[str, ...], Reading]] = []
    refusals: list[DataError] = []
    for carriers, samples in _taken_apart(first):
        try:
            reading = _read(samples, renames, kind, of_whole_record(first, carriers))
        except DataError as error:
            refusals.append(error)
            continue
        if carriers and carriers != PAIR and not f"{reading.response}.".startswith(f"{carriers[-1]}."):
            continue
        try:
            text_records.check_renames(samples, reading, renames)
            _check_reward(first, carriers, reading)
        except DataError as error:
            refusals.append(error)
            continue
        possible.append((carriers, reading))
    if not possible:
        raise refusals[0] if refusals else UnclearError("no field holds rollouts")
    tokens = [one for one in possible if one[1].is_tokens] or possible
    if len(tokens) > 1:
        names = [reading.response for _, reading in tokens]
        raise UnclearError(
            f"{' and '.join(f'`{name}`' for name in names)} could each be what the policy wrote",
            hint=f"say which: --column response={names[0]}",
        )
    return tokens[0]


def _read(samples: list[Fields], renames: dict[str, str], kind: str, shared: frozenset[str]) -> Reading:
    find_reward = {text_records.TRL: trl_reward, text_records.VERL: verl_reward}.get(kind, reward_fields)
    return read_fields(samples, renames, find_reward, shared)


def _taken_apart(first: list[Fields], depth: int = 2) -> Iterator[tuple[tuple[str, ...], list[Fields]]]:
    """The records as they are, and taken apart by each field that may hold several samples, the samples too."""
    waiting: list[tuple[str, ...]] = [(), *([PAIR] if is_scored_pair([flat(record) for record in first]) else [])]
    while waiting:
        carriers = waiting.pop(0)
        try:
            samples = [sample for record in first for sample in samples_of(record, carriers)][:SAMPLES_SEEN]
        except ValueError:
            continue
        if not samples:
            continue
        yield carriers, samples
        if len(carriers) < depth and carriers != PAIR:
            waiting += [
                (*carriers, name) for name in carriers_of(samples) if not carriers or name.startswith(carriers[-1])
            ]


def _check_reward(first: list[Fields], carriers: tuple[str, ...], reading: Reading) -> None:
    """Raise where several samples of one record share a reward that stands once."""
    is_apart = carriers and carriers != PAIR and reading.reward is not None
    for name in reading.reward.names if is_apart else ():
        for outer in (sample for record in first for sample in samples_of(record, carriers[:-1])):
            if len(outer[carriers[-1]] or ()) > 1 and isinstance(outer.get(name), str | bool | int | float):
                raise UnclearError(
                    f"`{name}` has one number for all {len(outer[carriers[-1]])} samples in `{carriers[-1]}`",
                    hint="--column reward=NAME takes a field with one number for each sample",
                )


def _open_table(source: Source, options: Options) -> Opened:
    """A Parquet or Arrow file."""
    tables = _arrow_batches(source) if source.path.suffix == ".arrow" else None
    if tables is None:
        (shard,) = find_shards([str(source.path)])
        shard = Shard(**{name: getattr(shard, name) for name in shard.__slots__} | {"name": source.name})
        try:
            schema = pq.read_schema(source.path)
        except (OSError, pa.ArrowException) as error:
            raise damaged(shard, error) from error
        total, batches = shard.num_rows, _parquet_batches(shard, schema.names)
    else:
        total, batches = tables
    first_batch = next(batches, None)
    if first_batch is None:
        return Opened(format="no rows", records=iter(()), total=0, unit="rollouts")
    first = first_batch.slice(0, FIRST_RECORDS).to_pylist()
    kind, read, understood = _reader(first, source, options)
    records = _rows(chain([first_batch], batches), None if read is _as_columns else read)
    return Opened(
        format=kind, records=records, total=total, unit="rollouts", renames=understood.columns,
        understood=understood.understood,
    )  # fmt: skip


def _parquet_batches(shard: Shard, names: list[str]) -> Iterator[pa.RecordBatch]:
    for piece in pieces(shard, names):
        refuse_oversized_rows(shard, piece)
        yield piece.rows


def _arrow_batches(source: Source) -> tuple[int, Iterator[pa.RecordBatch]]:
    """The rows of a file of Arrow's own, as datasets' `save_to_disk` writes it."""

    def batches(reader: Any) -> Iterator[pa.RecordBatch]:
        try:
            every = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
            for batch in every:
                batch.validate(full=True)
                yield from (batch.slice(start, ARROW_ROWS) for start in range(0, batch.num_rows, ARROW_ROWS))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{source.name}: the file is damaged ({str(error)[:120]})") from error

    mapped = pa.memory_map(str(source.path))
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    try:
        reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source.name}: the file is damaged ({str(error)[:120]})") from error
    return 0, batches(reader)


def _rows(
    batches: Iterable[pa.RecordBatch], read: Callable[[list[Line]], Records] | None
) -> Iterator[tuple[Records, int]]:
    """Rows as they are or through a reader of single records; numbered over the file."""
    done = 0
    for batch in batches:
        rows = np.arange(done, done + batch.num_rows)
        done += batch.num_rows
        if read is None:
            yield Records(batch=batch, rows=rows), done
        else:
            yield read(list(zip(rows.tolist(), batch.to_pylist(), strict=True))), done


def _retokenizer(source: Source, kind: str, options: Options) -> Retokenizer:
    """What makes token ids of a source of text.

    Raises:
        ConfigError: that was not allowed.
    """
    if options.retokenizer is None or not options.allow_retokenize:
        raise ConfigError(
            f"{source.name} is {kind}: it holds no token ids, and tokenized again they may differ from the policy's",
            hint="--tokenizer DIR (the policy's) with --allow-retokenize tokenizes it all the same",
        )
    return options.retokenizer


def _hold_to_format(source: Source, options: Options, kind: str, first: list[Fields]) -> None:
    """Raise where a file is not in the format of --from; text takes text of any kind."""
    is_text = options.format == "text" and kind != TOKENS
    is_wanted = kind == TOKENS if options.format == "tokens" else text_records.KINDS.get(options.format or "") == kind
    if options.format is not None and not is_text and not is_wanted:
        raise _unknown(source, options, f"its fields are {', '.join(list(first[0])[:SHOWN_FIELDS])}")


def _as_columns(lines: list[Line]) -> Records:
    rows = Rows()
    for row, line in lines:
        rows.add(row, line)
    return rows.records()


def _shape_of(content: Any) -> str:
    if isinstance(content, dict):
        return f"it holds a dictionary of {', '.join(map(str, list(content)[:SHOWN_FIELDS])) or 'nothing'}"
    return f"it holds a {type(content).__name__}"


def _unknown(source: Source, options: Options, reason: str) -> DataError:
    what = "is in no known format" if options.format is None else f"is not what --from {options.format} reads"
    return DataError(f"{source.name} {what}: {reason}", hint=f"known formats: {TITLES}")
