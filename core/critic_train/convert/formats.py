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

from critic_train.convert import nemo_rl, openrlhf, skyrl, slime, step_labels, text_records, trajectory_values, verl
from critic_train.convert.chat import Retokenizer
from critic_train.convert.dump_files import Source
from critic_train.convert.dump_tensors import RefusedError
from critic_train.convert.field_values import Fields
from critic_train.convert.fields import Reading
from critic_train.convert.json_records import FIRST_RECORDS, record_chunks
from critic_train.convert.raw_records import Line, LineFormat, ObjectFormat, Records, Rows
from critic_train.convert.readings import choose_reading, understanding
from critic_train.convert.table_files import arrow_batches, parquet_batches
from critic_train.convert.unpickle import load_dump
from critic_train.data.schema import ALIASES
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
FIRST_ROWS = 16
"""Rows of a table from which it is concluded which column is which; a column has one type in all rows."""


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
    chunks = record_chunks(source.path)
    good, bad, _ = first_chunk = next(chunks)
    if not good or (bad and bad[0].row < good[0][0]):
        raise _unknown(source, options, "it begins with no JSON object")
    kind, read, renames = _reader([record for _, record in good[:FIRST_RECORDS]], source, options)

    def records() -> Iterator[tuple[Records, int]]:
        for lines, odd, done in chain([first_chunk], chunks):
            chunk = read(lines)
            yield replace(chunk, bad=tuple(sorted((*chunk.bad, *odd), key=lambda record: record.row))), done

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
    understood = understanding(
        reading, carriers, first, record_reader.retokenizer, apply_chat_template=options.apply_chat_template
    )
    kind = TOKENS if reading.is_tokens else kind
    return kind, record_reader, _Understood(columns={}, understood=understood)


def _stands_in_columns(reading: Reading, carriers: tuple[str, ...]) -> bool:
    """Whether token ids and rewards are read as they are, each in a column of its own."""
    names = [*reading.parts.values(), *(reading.reward.names if reading.reward else ())]
    is_plain = reading.reward is None or (len(reading.reward.names) == 1 and not reading.reward.is_text)
    return (
        not carriers and is_plain and "response_length" not in reading.parts and not any("." in name for name in names)
    )


def _names_of(*canonical: str) -> set[str]:
    return {name for one in canonical for name in (one, *ALIASES[one])}


def _open_table(source: Source, options: Options) -> Opened:
    """A Parquet or Arrow file."""
    total, batches = (arrow_batches if source.path.suffix == ".arrow" else parquet_batches)(source.path, source.name)
    first_batch = next(batches, None)
    if first_batch is None:
        return Opened(format="no rows", records=iter(()), total=0, unit="rollouts")
    first = first_batch.slice(0, FIRST_ROWS).to_pylist()
    kind, read, understood = _reader(first, source, options)
    records = _rows(chain([first_batch], batches), None if read is _as_columns else read)
    return Opened(
        format=kind, records=records, total=total, unit="rollouts", renames=understood.columns,
        understood=understood.understood,
    )  # fmt: skip


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
