"""`critic-train convert`, from top to bottom: find files, recognise formats, read, make canonical, write."""

import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from critic_train.convert.chat import Retokenizer
from critic_train.convert.converted_folder import ConvertedFolder, SourceShards
from critic_train.convert.dump_files import Source, find_sources
from critic_train.convert.formats import Opened, Options, open_source
from critic_train.convert.raw_records import Records
from critic_train.data.bad_input import BadFile, BadFiles, BadRow, BadRows
from critic_train.data.row_checks import CheckedBatch, RowLimits, check_batch
from critic_train.data.schema import ALIASES, Columns, Needs, resolve_schema
from critic_train.data.shards import Shard
from critic_train.data.writing import rollout_table
from critic_train.errors import DataError
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.rollouts import offsets_from_lengths, ragged_take
from critic_train.settings import ConvertSettings, column_renames
from critic_train.stopping import StopRequest

TOKEN_NAMES = ("values", "returns", "rewards")
FIRST_BAD_ROWS = 10
"""How many are named."""


def convert(settings: ConvertSettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Make canonical shards of rollout dumps. Called again, it goes on where it stopped.

    Either all shards of a source are written or none. Memory holds one source of a pickled format, and a row group of
    any other.

    Args:
        settings: what to read, and where to write.
        stop: checked between pieces of a source; sources that are finished keep their shards.

    Yields:
        Progress and notices; RunEnded last, whose result lists the sources and what was made of them.

    Raises:
        CriticTrainError: an error that the user can correct.
    """
    stop = stop or StopRequest()
    sources = find_sources(settings.reading.source)
    options = Options(
        format=settings.reading.source_format,
        renames=column_renames(settings.reading.column),
        retokenizer=Retokenizer(Path(settings.reading.tokenizer)) if settings.reading.tokenizer else None,
        allow_retokenize=settings.reading.allow_retokenize,
    )
    assert settings.output.to is not None, "checked by the settings"
    with ConvertedFolder(Path(settings.output.to), _relevant_settings(settings)) as folder:
        work = _Work(folder=folder, options=options, on_bad_rows=settings.reading.on_bad_rows)
        for source in sources:
            yield from work.convert(source, stop)
            if stop.requested:
                yield RunEnded(status="interrupted", result=work.result(), signal_number=stop.signal_number)
                return
        work.check(settings.reading.on_bad_file)
        yield from work.closing_notices()
        yield RunEnded(status="already finished" if work.all_recorded else "finished", result=work.result())


@dataclass(slots=True, kw_only=True)
class _Work:
    """One conversion under way."""

    folder: ConvertedFolder
    options: Options
    on_bad_rows: str
    bad_rows: BadRows = field(default_factory=BadRows)
    bad_files: BadFiles = field(default_factory=BadFiles)
    entries: list[dict[str, Any]] = field(default_factory=list)
    all_recorded: bool = True
    notices: dict[str, None] = field(default_factory=dict)

    def convert(self, source: Source, stop: StopRequest) -> Generator[Event, None, None]:
        """Convert one source; a bad file is collected, to be reported at the end."""
        try:
            stamp = source.stamp
            entry = self.folder.recorded(source.name, stamp)
            if entry is None:
                self.all_recorded = False
                with source.local() as local:
                    opened = open_source(local, self.options)
                    entry = yield from self._write(local, opened, stop)
        except DataError as error:
            self.bad_files.add(BadFile.of(source.name, error, None))
            return
        except OSError as error:
            if error.filename is None or str(error.filename) != str(source.path):
                raise
            reason = DataError(f"{source.name}: {error.strerror or error}")
            self.bad_files.add(BadFile.of(source.name, reason, None))
            return
        if entry is not None:
            if entry["stamp"] is None:
                entry = {**entry, "stamp": stamp}
                self.folder.record(entry)
            self.entries.append(entry)

    def _write(
        self, source: Source, opened: Opened, stop: StopRequest
    ) -> Generator[Event, None, dict[str, Any] | None]:
        """Write the shards of one source; what is recorded of it, None where it has no shards."""
        canonicaliser = Canonicaliser(
            name=source.name, renames=opened.renames, unit=opened.row_unit, understood=dict(opened.understood)
        )
        count_before = _retokenized(self.options.retokenizer)
        with SourceShards(self.folder.path, self.folder.number_of(source.name)) as shards:
            tables: list[pa.Table] = []
            for records, done in opened.records:
                table = canonicaliser.table(records)
                if table is not None:
                    (tables.append if opened.in_memory else shards.write)(table)
                yield Progress(stage=f"converting {source.path.name}", done=done, total=opened.total, unit=opened.unit)
                if stop.requested:
                    shards.drop()
                    return None
            if tables:
                shards.write(groups_together(_joined(tables)))
            self._add_bad_rows(canonicaliser.bad_rows)
            yield from self._notices(canonicaliser, opened)
            if canonicaliser.bad_rows.count and self.on_bad_rows == "fail":
                shards.drop()
                return None
        count = _retokenized(self.options.retokenizer)
        return {
            "name": source.name,
            "stamp": None,
            "format": opened.format,
            "shards": [path.name for path in shards.files],
            "rollouts": shards.rollouts,
            "tokens": shards.tokens,
            "response_tokens": shards.response_tokens,
            "columns": shards.columns,
            "bad_rows": canonicaliser.bad_rows.summary(),
            "retokenized": {key: count[key] - count_before[key] for key in count},
        }

    def _notices(self, canonicaliser: "Canonicaliser", opened: Opened) -> Iterator[Event]:
        for sentence in (f"{canonicaliser.name} is read as {opened.format}", *canonicaliser.notes):
            key = sentence.removeprefix(canonicaliser.name)
            if key not in self.notices:
                self.notices[key] = None
                yield Notice(message=sentence)

    def _add_bad_rows(self, more: BadRows) -> None:
        self.bad_rows.count += more.count
        self.bad_rows.reasons.update(more.reasons)
        self.bad_rows.first = [*self.bad_rows.first, *more.first][:FIRST_BAD_ROWS]

    def check(self, on_bad_file: str) -> None:
        """Raise where there are bad rows or files that may not be left out, or no rollouts."""
        errors = []
        if self.bad_files and (on_bad_file == "fail" or not self.entries):
            errors.append(self.bad_files.error(all_of_them=not self.entries))
        if self.bad_rows.count and (self.on_bad_rows == "fail" or not self._rollouts()):
            errors.append(self.bad_rows.error(all_of_them=not self._rollouts()))
        if not errors and not self._rollouts():
            errors.append(DataError("there is not one rollout in the sources"))
        if errors:
            hint = "\n".join(dict.fromkeys(error.hint for error in errors if error.hint))
            raise DataError("\n".join(error.message for error in errors), hint=hint)

    def closing_notices(self) -> Iterator[Notice]:
        """What was left out or is missing, over all sources."""
        result = self.result()
        if self.bad_files:
            yield Notice(message=self.bad_files.sentence(), level="warning")
        retokenized = result["retokenized"]
        if retokenized["rollouts"]:
            yield Notice(
                message=f"{retokenized['rollouts']:,} rollouts ({retokenized['tokens']:,} tokens) were made of text: "
                "token boundaries may differ from the policy's, and special tokens that the text lacks are not in them",
                level="warning",
            )
        if "returns" not in result["columns"]:
            there = {name for entry in self.entries for name in entry["columns"]}
            paid = " and ".join(f"`{name}`" for name in ("rewards", "reward") if name in there)
            whose = "there are no returns" if "returns" not in there else "some sources have no returns"
            yield Notice(message=f"{whose}; `fit --returns mc` or `gae` makes them of {paid}")

    def _rollouts(self) -> int:
        return sum(entry["rollouts"] for entry in self.entries)

    def result(self) -> dict[str, Any]:
        """What `--json` prints."""
        shards = [shard for entry in self.entries for shard in entry["shards"]]
        columns = list(dict.fromkeys(name for entry in self.entries for name in entry["columns"]))
        everywhere = [name for name in columns if all(name in entry["columns"] for entry in self.entries)]
        returns = "column" if "returns" in everywhere else "mc"
        old_values = "" if "values" in everywhere else " --old-values none"
        return {
            "to": str(self.folder.path),
            **{key: sum(entry[key] for entry in self.entries) for key in ("rollouts", "tokens", "response_tokens")},
            "shards": len(shards),
            "bytes": sum((self.folder.path / shard).stat().st_size for shard in shards),
            "columns": everywhere,
            "sources": [{key: entry[key] for key in ("name", "format", "rollouts")} for entry in self.entries],
            "retokenized": {
                key: sum(entry["retokenized"][key] for entry in self.entries) for key in ("rollouts", "tokens")
            },
            "rows_left_out": self._left_out(),
            "files_left_out": self.bad_files.summary(),
            "next": f"critic-train fit --data {self.folder.path} --returns {returns}{old_values}",
        }

    def _left_out(self) -> dict[str, Any]:
        """Bad rows of this conversion, and of sources that an earlier one converted."""
        summaries = [entry["bad_rows"] for entry in self.entries]
        reasons: dict[str, int] = {}
        for summary in summaries:
            for reason, count in summary["reasons"].items():
                reasons[reason] = reasons.get(reason, 0) + count
        first = [row for summary in summaries for row in summary["first"]][:FIRST_BAD_ROWS]
        return {"count": sum(summary["count"] for summary in summaries), "reasons": reasons, "first": first}


def _joined(tables: list[pa.Table]) -> pa.Table:
    """Tables of one source, of the same columns or with nulls where they differ."""
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def _retokenized(retokenizer: Retokenizer | None) -> dict[str, int]:
    if retokenizer is None:
        return {"rollouts": 0, "tokens": 0}
    return {"rollouts": retokenizer.rollouts, "tokens": retokenizer.tokens}


def _relevant_settings(settings: ConvertSettings) -> dict[str, Any]:
    """Settings that change the shards; --on-bad-file changes none of those that are written."""
    return {
        "--from": settings.reading.source_format,
        "--column": settings.reading.column,
        "--on-bad-rows": settings.reading.on_bad_rows,
        "--tokenizer": settings.reading.tokenizer,
        "--allow-retokenize": settings.reading.allow_retokenize,
    }


@dataclass(slots=True)
class Canonicaliser:
    """Makes canonical tables of one source's records: checked by the code that reads shards, padding removed.

    Args:
        name: the source, for messages.
        renames: canonical name -> the source's column, from --column.
        unit: what a record's number counts in the source: "row", "line", ...

    Attributes:
        bad_rows: records that were left out.
        notes: sentences on columns that were left out or taken under another name.
    """

    name: str
    renames: dict[str, str]
    unit: str = "row"
    understood: dict[str, str] = field(default_factory=dict)
    bad_rows: BadRows = field(default_factory=BadRows)
    notes: dict[str, None] = field(default_factory=dict)
    _columns: dict[str, Columns] = field(default_factory=dict)

    def table(self, records: Records) -> pa.Table | None:
        """The good rollouts among some records; None where there is none.

        Raises:
            DataError: a column is missing or of the wrong type.
        """
        self.notes.update(dict.fromkeys(records.notes))
        for bad in records.bad:
            self._count(bad.reason, bad.row, bad.column, bad.actual, bad.expected)
        batch = records.batch
        if not batch.num_rows:
            return None
        columns = self._resolve(batch.schema)
        has_rewards = columns.rewards or columns.reward
        checked = check_batch(batch, columns, RowLimits(), "yes" if has_rewards else "no")
        for row, (reason, column, actual, expected) in sorted(checked.errors.by_row.items()):
            self._count(reason, int(records.rows[row]), column, actual, expected)
        good = np.flatnonzero(~checked.errors.bad)
        if not len(good):
            return None
        return self._table(batch, columns, checked, good)

    def _resolve(self, schema: pa.Schema) -> Columns:
        key = schema.to_string()
        if key not in self._columns:
            names = set(schema.names) | set(self.renames)
            shard = Shard(path=self.name, name=self.name, num_rows=1, num_row_groups=1, size_bytes=0, footer_digest="")
            has = {name: bool(names & {name, *ALIASES[name]}) for name in ("returns", "truncated")}
            has_rewards = bool(names & {"rewards", "reward", *ALIASES["rewards"], *ALIASES["reward"]})
            needs = Needs(
                returns=has["returns"] or not has_rewards,
                values=False,
                rewards="where there" if has["returns"] else "yes",
                truncated=has["truncated"],
            )
            columns = resolve_schema(schema, shard, renames=self.renames, labels=(), needs=needs)
            self.notes.update(dict.fromkeys(columns.notices()))
            self._columns[key] = columns
        return self._columns[key]

    def _table(
        self, batch: pa.RecordBatch, columns: Columns, checked: CheckedBatch, good: NDArray[np.int64]
    ) -> pa.Table:
        """The canonical columns of the good rows, and all others with one entry a rollout."""
        positions, offsets = ragged_take(offsets_from_lengths(checked.lengths), good)
        tokens = {"input_ids": checked.input_ids[positions], "response_mask": checked.response_mask[positions]}
        source_names = {"values": columns.values, "returns": columns.returns, "rewards": columns.rewards}
        for name in TOKEN_NAMES:
            column = getattr(checked, name)
            if source_names[name] is not None and column is not None:
                tokens[name] = column[positions]
        single: dict[str, pa.Array] = {}
        if columns.uid is not None:
            single["uid"] = pc.cast(batch.column(columns.uid), pa.string())
        single |= self._carried(batch, columns)
        if columns.reward is not None:
            single["reward"] = pc.cast(batch.column(columns.reward), pa.float64())
        if checked.truncated is not None:
            single["truncated"] = pa.array(checked.truncated)
        taken = {name: column.take(pa.array(good)) for name, column in single.items()}
        return rollout_table(offsets, tokens, taken)

    def _carried(self, batch: pa.RecordBatch, columns: Columns) -> dict[str, pa.Array]:
        """Columns with one entry a rollout that are not canonical, under their own names."""
        read = {*columns.names(), "attention_mask"}
        carried: dict[str, pa.Array] = {}
        for field_, column in zip(batch.schema, batch.columns, strict=True):
            if field_.name in read or field_.name in ALIASES:
                continue
            if pa.types.is_nested(field_.type) or pa.types.is_null(field_.type):
                if not pa.types.is_null(field_.type):
                    self.notes.setdefault(f"`{field_.name}` is left out: a critic needs none of it")
            else:
                carried[field_.name] = column
        return carried

    def _count(self, reason: str, row: int, column: str, actual: str, expected: str) -> None:
        bad = BadRow(file=self.name, unit=self.unit, row=row, column=column, actual=actual, expected=expected)
        self.bad_rows.add(reason, bad)


def groups_together(table: pa.Table) -> pa.Table:
    """The rollouts of a prompt group next to each other, groups in the order in which they first appear.

    A group is a uid; without that column, a prompt.
    """
    keys = table.column("uid") if "uid" in table.column_names else pa.chunked_array([_prompts(table)])
    # A rollout without a uid is a group of its own.
    keys = pc.if_else(pc.is_valid(keys), keys, pa.array([f"\0{row}" for row in range(len(keys))]))
    encoded = keys.combine_chunks().dictionary_encode()
    order = np.argsort(encoded.indices.to_numpy(), kind="stable")
    return table if (np.diff(order) == 1).all() else table.take(pa.array(order))


def _prompts(table: pa.Table) -> pa.Array:
    """A text for each prompt: the tokens before the first response token."""
    ids, mask = table.column("input_ids").combine_chunks(), table.column("response_mask").combine_chunks()
    flat, marked = ids.flatten().to_numpy(), np.flatnonzero(mask.flatten().to_numpy(zero_copy_only=False))
    offsets = np.asarray(ids.offsets.to_numpy(), dtype=np.int64)
    offsets = offsets - offsets[0]
    ends = marked[np.searchsorted(marked, offsets[:-1])]
    spans = zip(offsets[:-1].tolist(), ends.tolist(), strict=True)
    return pa.array([hashlib.blake2b(flat[start:end].tobytes(), digest_size=16).hexdigest() for start, end in spans])
