"""Which format a file is in, and its records.

A format of pickled objects or of JSON Lines is declared in its own module and listed in FORMATS. Token ids and text in
JSON Lines or Parquet are read here, whatever wrote them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from critic_train.convert import nemo_rl, openrlhf, slime, text_records, verl
from critic_train.convert.dump_files import Source, first_record, line_chunks
from critic_train.convert.dump_tensors import RefusedError
from critic_train.convert.raw_records import Line, LineFormat, ObjectFormat, Records, Rows
from critic_train.convert.unpickle import load_dump
from critic_train.data.decoding import damaged, pieces, refuse_oversized_rows
from critic_train.data.schema import ALIASES, list_item_type
from critic_train.data.shards import Shard, find_shards
from critic_train.errors import ConfigError, DataError

Format = TypeVar("Format", ObjectFormat, LineFormat)
FORMATS: tuple[ObjectFormat | LineFormat, ...] = (slime.FORMAT, verl.FORMAT, nemo_rl.FORMAT, openrlhf.FORMAT)
"""Recognised in this order."""
TOKENS = "token ids"
FORMAT_NAMES = tuple(dict.fromkeys((*(one.name for one in FORMATS), *text_records.KINDS, "tokens")))
"""The values of --from."""
TITLES = ", ".join((*(one.title for one in FORMATS), text_records.TITLE))
ID_COLUMNS = ("input_ids", "responses")
SHOWN_FIELDS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How sources are read.

    Attributes:
        format: --from, None where formats are recognised.
        renames: canonical name -> the source's column, from --column.
        retokenizer: makes token ids of text, None without --tokenizer.
        allow_retokenize: whether text may be read.
    """

    format: str | None
    renames: dict[str, str] = field(default_factory=dict)
    retokenizer: text_records.Retokenizer | None = None
    allow_retokenize: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A source whose format is recognised.

    Attributes:
        format: what it is called in messages.
        records: pieces of it, each with how many bytes or rows are done.
        total, unit: of what `records` counts.
        in_memory: whether all of it is in memory at once, so that prompt groups can be put together.
        row_unit: what a record's number counts.
        renamed: whether --column was applied, so that the columns have their canonical names.
    """

    format: str
    records: Iterator[tuple[Records, int]]
    total: int
    unit: str
    in_memory: bool = False
    row_unit: str = "row"
    renamed: bool = False


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
    if head == b"PAR1":
        return _open_parquet(source, options)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _open_pickle(source, options)
    return _open_lines(source, options)


def _open_pickle(source: Source, options: Options) -> Opened:
    content = load_dump(source.path, source.name)
    recognised = _recognise(content, ObjectFormat, options)
    if recognised is None:
        raise _unknown(source, options, _shape_of(content))
    kind, one = recognised
    size = source.path.stat().st_size
    records = ((records, size) for records in _with_name(one.read(content), source))
    return Opened(format=kind, records=records, total=size, unit="bytes", in_memory=True, row_unit="sample")


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


def _open_lines(source: Source, options: Options) -> Opened:
    first = first_record(source.path)
    if first is None:
        raise _unknown(source, options, "it begins with no JSON object")
    recognised = _recognise(first, LineFormat, options)
    if recognised is not None:
        kind, one = recognised
        return _lines(source, kind, lambda lines: one.read(lines, source.path.name))
    lists = {name for name, value in first.items() if isinstance(value, list) and value and isinstance(value[0], int)}
    if options.format in (None, "tokens") and _has_ids(lists, options):
        return _lines(source, TOKENS, _as_columns)
    return replace(_lines(source, *_text(source, options, list(first))), renamed=True)


def _lines(source: Source, kind: str, read: Callable[[list[Line]], Records]) -> Opened:
    def records() -> Iterator[tuple[Records, int]]:
        for good, bad, done in line_chunks(source.path):
            chunk = read(good)
            all_bad = tuple(sorted((*chunk.bad, *bad), key=lambda record: record.row))
            yield replace(chunk, bad=all_bad), done

    return Opened(format=kind, records=records(), total=source.path.stat().st_size, unit="bytes", row_unit="record")


def _open_parquet(source: Source, options: Options) -> Opened:
    (shard,) = find_shards([str(source.path)])
    shard = Shard(**{name: getattr(shard, name) for name in shard.__slots__} | {"name": source.name})
    try:
        schema = pq.read_schema(source.path)
    except (OSError, pa.ArrowException) as error:
        raise damaged(shard, error) from error
    lists = {one.name for one in schema if _holds_integers(one.type)}
    if options.format in (None, "tokens") and _has_ids(lists, options):
        kind, records, renamed = TOKENS, _rows(shard, schema.names, None), False
    else:
        kind, read = _text(source, options, schema.names)
        records, renamed = _rows(shard, schema.names, read), True
    return Opened(format=kind, records=records, total=shard.num_rows, unit="rollouts", renamed=renamed)


def _rows(
    shard: Shard, names: list[str], read: Callable[[list[Line]], Records] | None
) -> Iterator[tuple[Records, int]]:
    """A Parquet file's rows, as they are or through a reader of single records; numbered over the file."""
    done = 0
    for piece in pieces(shard, names):
        refuse_oversized_rows(shard, piece)
        batch = piece.rows
        rows = np.arange(done, done + batch.num_rows)
        done += batch.num_rows
        if read is None:
            yield Records(batch=batch, rows=rows), done
        else:
            yield read(list(zip(rows.tolist(), batch.to_pylist(), strict=True))), done


def _text(source: Source, options: Options, names: list[str]) -> tuple[str, Callable[[list[Line]], Records]]:
    """The kind of text, and its reader."""
    kind = text_records.kind_of(names)
    if kind is None and set(options.renames) & {"messages", "prompt", "response"}:
        kind = text_records.TEXT
    # --from text takes text of any kind.
    is_wanted = options.format in (None, "text") or text_records.KINDS.get(options.format) == kind
    if kind is None or not is_wanted:
        raise _unknown(source, options, f"its fields are {', '.join(names[:SHOWN_FIELDS])}")
    if options.retokenizer is None or not options.allow_retokenize:
        raise ConfigError(
            f"{source.name} is {kind}: it holds no token ids, and tokenized again they may differ from the policy's",
            hint="--tokenizer DIR (the policy's) with --allow-retokenize tokenizes it all the same",
        )
    retokenizer = options.retokenizer
    return kind, lambda lines: text_records.records(lines, kind, retokenizer, options.renames)


def _as_columns(lines: list[Line]) -> Records:
    rows = Rows()
    for row, line in lines:
        rows.add(row, line)
    return rows.records()


def _has_ids(lists: set[str], options: Options) -> bool:
    """Whether one of the columns is token ids by its name."""
    names = {name for canonical in ID_COLUMNS for name in (canonical, *ALIASES[canonical])}
    names |= {options.renames[name] for name in ID_COLUMNS if name in options.renames}
    return bool(lists & names)


def _holds_integers(kind: pa.DataType) -> bool:
    item = list_item_type(kind)
    return item is not None and bool(pa.types.is_integer(item))


def _shape_of(content: Any) -> str:
    if isinstance(content, dict):
        return f"it holds a dictionary of {', '.join(map(str, list(content)[:SHOWN_FIELDS])) or 'nothing'}"
    return f"it holds a {type(content).__name__}"


def _unknown(source: Source, options: Options, reason: str) -> DataError:
    what = "is in no known format" if options.format is None else f"is not what --from {options.format} reads"
    return DataError(f"{source.name} {what}: {reason}", hint=f"known formats: {TITLES}")
