"""Which format a file is in, and its records: the one place where the formats come together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from critic_train.converting import jsonl, nemo_rl, openrlhf, slime, text, verl
from critic_train.converting.dump_tensors import RefusedError
from critic_train.converting.records import Records, Rows
from critic_train.converting.sources import Source
from critic_train.converting.unpickle import load_dump
from critic_train.data.columns import ALIASES
from critic_train.data.decoding import damaged, pieces, refuse_giants
from critic_train.data.shards import Shard, find_shards
from critic_train.errors import ConfigError, DataError

TOKENS = "token ids"
PICKLED: dict[str, Any] = {"slime": slime, "verl": verl, "openrlhf": openrlhf}
"""--from of formats that are a pickle or `.pt` file -> the module that reads it."""
IDS = {"input_ids", "responses"}
SHOWN_FIELDS = 12
KNOWN = (
    "slime .pt, verl DataProto or JSONL, NeMo-RL JSONL, OpenRLHF .pt of the snippet in docs/convert.md, TRL Parquet, "
    "and JSONL or Parquet of token ids, of messages, or of prompt, response and score"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command says of how sources are read."""

    format: str | None
    renames: dict[str, str] = field(default_factory=dict)
    retokenizer: text.Retokenizer | None = None
    allow_retokenize: bool = False
    limit_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A source whose format is known.

    Attributes:
        format: in words.
        records: what is in it, piece by piece, and how many bytes or rows are done.
        total, unit: of what `records` counts.
        whole: whether it stands in memory as a whole, so that prompt groups can be put together.
        row_unit: what a record's number counts.
        renamed: whether --column was seen to, so that the columns have their canonical names.
    """

    format: str
    records: Iterator[tuple[Records, int]]
    total: int
    unit: str
    whole: bool = False
    row_unit: str = "row"
    renamed: bool = False


def open_source(source: Source, options: Options) -> Opened:
    """Recognise a source's format, or hold it to the one that was said.

    Raises:
        DataError: it is in no known format, or not in the one that was said; it is damaged, or wants to run code.
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
    content = load_dump(source.path, source.name, limit_bytes=options.limit_bytes)
    for name, module in PICKLED.items():
        kind = module.kind_of(content)
        if kind is not None and options.format in (None, name):
            size = source.path.stat().st_size
            records = ((records, size) for records in _named(module.records(content), source))
            return Opened(format=kind, records=records, total=size, unit="bytes", whole=True, row_unit="sample")
    raise _unknown(source, options, _shape_of(content))


def _named(records: Iterator[Records], source: Source) -> Iterator[Records]:
    """Puts the file's name to what is said of its content."""
    try:
        yield from records
    except RefusedError as refusal:
        raise DataError(f"{source.name}: {refusal.message}", hint=refusal.hint) from None
    except DataError as error:
        raise DataError(f"{source.name}: {error.message}", hint=error.hint) from None


def _open_lines(source: Source, options: Options) -> Opened:
    first = jsonl.first_record(source.path)
    if first is None:
        raise _unknown(source, options, "it begins with no JSON object")
    if options.format in (None, "nemo-rl") and nemo_rl.kind_of(first) is not None:
        return _lines(source, nemo_rl.FORMAT, lambda lines: nemo_rl.records(lines, source.path.name))
    lists = {name for name, value in first.items() if isinstance(value, list) and value and isinstance(value[0], int)}
    if options.format in (None, "tokens") and _has_ids(lists, options):
        return _lines(source, TOKENS, _tabulated)
    return replace(_lines(source, *_text(source, options, list(first))), renamed=True)


def _lines(source: Source, kind: str, read: Callable[[list[tuple[int, dict[str, Any]]]], Records]) -> Opened:
    def records() -> Iterator[tuple[Records, int]]:
        for good, bad, done in jsonl.chunks(source.path):
            made = read(good)
            both = tuple(sorted((*made.bad, *bad), key=lambda record: record.row))
            yield Records(batch=made.batch, rows=made.rows, bad=both, notes=made.notes), done

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
    shard: Shard, names: list[str], read: Callable[[list[tuple[int, dict[str, Any]]]], Records] | None
) -> Iterator[tuple[Records, int]]:
    """A Parquet file's rows, as they are or through a reader of single records; numbered over the whole file."""
    done = 0
    for piece in pieces(shard, names):
        refuse_giants(shard, piece)
        batch = piece.rows
        rows = np.arange(done, done + batch.num_rows)
        done += batch.num_rows
        if read is None:
            yield Records(batch=batch, rows=rows), done
        else:
            yield read(list(zip(rows.tolist(), batch.to_pylist(), strict=True))), done


def _text(
    source: Source, options: Options, names: list[str]
) -> tuple[str, Callable[[list[tuple[int, dict[str, Any]]]], Records]]:
    """The kind of text, and its reader."""
    kind = text.kind_of(names)
    if kind is None and set(options.renames) & {"messages", "prompt", "response"}:
        kind = text.TEXT
    wanted = {"verl": text.VERL, "trl": text.TRL, "text": kind}.get(options.format or "", kind)
    if kind is None or options.format not in (None, "verl", "trl", "text") or wanted != kind:
        raise _unknown(source, options, f"its fields are {', '.join(names[:SHOWN_FIELDS])}")
    if options.retokenizer is None or not options.allow_retokenize:
        raise ConfigError(
            f"{source.name} is {kind}: it holds no token ids, and made anew they may differ from the policy's",
            hint="--tokenizer DIR (the policy's) with --allow-retokenize makes them all the same",
        )
    retokenizer = options.retokenizer
    return kind, lambda lines: text.records(lines, kind, retokenizer, options.renames)


def _tabulated(lines: list[tuple[int, dict[str, Any]]]) -> Records:
    rows = Rows()
    for row, line in lines:
        rows.add(row, line)
    return rows.records()


def _has_ids(lists: set[str], options: Options) -> bool:
    """Whether one of the columns is token ids by its name."""
    names = {name for canonical in IDS for name in (canonical, *ALIASES[canonical])}
    names |= {options.renames[name] for name in IDS if name in options.renames}
    return bool(lists & names)


def _holds_integers(kind: pa.DataType) -> bool:
    return hasattr(kind, "value_type") and pa.types.is_integer(kind.value_type) and not pa.types.is_dictionary(kind)


def _shape_of(content: Any) -> str:
    if isinstance(content, dict):
        return f"it holds a dictionary of {', '.join(map(str, list(content)[:SHOWN_FIELDS])) or 'nothing'}"
    return f"it holds a {type(content).__name__}"


def _unknown(source: Source, options: Options, what: str) -> DataError:
    told = "is in no format that is known" if options.format is None else f"is not what --from {options.format} reads"
    return DataError(f"{source.name} {told}: {what}", hint=f"known are: {KNOWN}")
