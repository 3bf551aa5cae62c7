"""`critic-train convert`, from top to bottom: find files, recognise formats, read, make canonical, write."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from critic_train.convert.canonical import Canonicaliser, groups_together
from critic_train.convert.chat import Retokenizer
from critic_train.convert.converted_folder import ConvertedFolder, SourceShards
from critic_train.convert.dump_files import Source, find_sources
from critic_train.convert.formats import Opened, Options, open_source
from critic_train.data.bad_input import BadFile, BadFiles, BadRows
from critic_train.data.groups import grouping_renames
from critic_train.errors import DataError
from critic_train.events import Event, Notice, Progress, RunEnded
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
        renames=grouping_renames(column_renames(settings.reading.column), settings.reading.group_by),
        group_by=settings.reading.group_by,
        retokenizer=Retokenizer(Path(settings.reading.tokenizer)) if settings.reading.tokenizer else None,
        allow_retokenize=settings.reading.allow_retokenize,
        apply_chat_template=settings.reading.apply_chat_template,
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
            name=source.name,
            renames=opened.renames,
            unit=opened.row_unit,
            group_by=self.options.group_by,
            understood=dict(opened.understood),
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
            canonicaliser.finish()
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
            "read_as": canonicaliser.understood,
            "retokenized": {key: count[key] - count_before[key] for key in count},
        }

    def _notices(self, canonicaliser: "Canonicaliser", opened: Opened) -> Iterator[Event]:
        read_as = f"{canonicaliser.name} is read as {opened.format}"
        for sentence in (read_as, canonicaliser.sentence(), *canonicaliser.notes):
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
            "sources": [
                {key: entry.get(key) for key in ("name", "format", "rollouts", "read_as")} for entry in self.entries
            ],
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
        "--apply-chat-template": settings.reading.apply_chat_template,
        "--group-by": settings.reading.group_by,
    }
