"""`critic-train convert`, from top to bottom: find, recognise, read, make canonical, write."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from critic_train.convert.canonical_records import Canonicaliser, groups_together
from critic_train.convert.formats import Opened, Options, open_source
from critic_train.convert.output import ConvertedFolder, SourceShards
from critic_train.convert.sources import Source, find_sources
from critic_train.convert.text import Retokenizer
from critic_train.data.bad_input import BadFile, BadFiles, BadRows
from critic_train.errors import DataError
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.settings import ConvertSettings, column_renames
from critic_train.stopping import StopRequest


def convert(settings: ConvertSettings, stop: StopRequest) -> Iterator[Event]:
    """Make canonical shards of rollout dumps. Done again, it goes on where it stopped.

    A source's shards stand together or not at all. Memory holds one source of a pickled format, and a row group of
    any other.

    Args:
        settings: what to read, and where to write.
        stop: looked at between pieces of a source; what is converted so far stands.

    Yields:
        Progress and notices; RunEnded last, whose result says what was made of what.

    Raises:
        CriticTrainError: a fault that the user can mend.
    """
    sources = find_sources(settings.reading.source)
    options = Options(
        format=settings.reading.source_format,
        renames=column_renames(settings.reading.column),
        retokenizer=Retokenizer(Path(settings.reading.tokenizer)) if settings.reading.tokenizer else None,
        allow_retokenize=settings.reading.allow_retokenize,
    )
    assert settings.output.to is not None, "settings.output.validate requires it"
    with ConvertedFolder(Path(settings.output.to), _what_it_depends_on(settings)) as folder:
        work = _Work(folder=folder, options=options, on_bad_rows=settings.reading.on_bad_rows)
        for source in sources:
            yield from work.convert(source, stop)
            if stop.requested:
                yield RunEnded(status="interrupted", result=work.result(), signal_number=stop.signal_number)
                return
        work.judge(settings.reading.on_bad_file)
        yield from work.closing_notices()
        yield RunEnded(status="already finished" if work.all_were_there else "finished", result=work.result())


@dataclass(slots=True, kw_only=True)
class _Work:
    """One conversion under way."""

    folder: ConvertedFolder
    options: Options
    on_bad_rows: str
    bad_rows: BadRows = field(default_factory=BadRows)
    bad_files: BadFiles = field(default_factory=BadFiles)
    entries: list[dict[str, Any]] = field(default_factory=list)
    all_were_there: bool = True
    said: dict[str, None] = field(default_factory=dict)

    def convert(self, source: Source, stop: StopRequest) -> Generator[Event, None, None]:
        """One source; what is wrong with it is kept for the end."""
        try:
            stamp = source.stamp
            entry = self.folder.recorded(source.name, stamp)
            if entry is None:
                self.all_were_there = False
                with source.here() as fetched:
                    opened = open_source(fetched, self.options)
                    entry = yield from self._write(fetched, opened, stop)
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
        """The shards of one source, and what is kept of it; None where nothing may be."""
        renames = {} if opened.renamed else self.options.renames
        maker = Canonicaliser(name=source.name, renames=renames, unit=opened.row_unit)
        made_before = _made(self.options.retokenizer)
        with SourceShards(self.folder.path, self.folder.place_of(source.name)) as shards:
            waiting: list[pa.Table] = []
            for records, done in opened.records:
                table = maker.table(records)
                if table is not None:
                    (waiting.append if opened.whole else shards.write)(table)
                yield Progress(stage=f"converting {source.path.name}", done=done, total=opened.total, unit=opened.unit)
                if stop.requested:
                    shards.drop()
                    return None
            if waiting:
                shards.write(groups_together(_joined(waiting)))
            self._keep_bad_rows(maker.bad_rows)
            yield from self._say(maker, opened)
            if maker.bad_rows.count and self.on_bad_rows == "fail":
                shards.drop()
                return None
        made = _made(self.options.retokenizer)
        return {
            "name": source.name,
            "stamp": None,
            "format": opened.format,
            "shards": [path.name for path in shards.files],
            "rollouts": shards.rollouts,
            "tokens": shards.tokens,
            "response_tokens": shards.response_tokens,
            "columns": shards.columns,
            "bad_rows": maker.bad_rows.summary(),
            "retokenized": {key: made[key] - made_before[key] for key in made},
        }

    def _say(self, maker: Canonicaliser, opened: Opened) -> Iterator[Event]:
        for sentence in (f"{maker.name} is read as {opened.format}", *maker.notes):
            key = sentence.removeprefix(maker.name)
            if key not in self.said:
                self.said[key] = None
                yield Notice(message=sentence)

    def _keep_bad_rows(self, found: BadRows) -> None:
        self.bad_rows.count += found.count
        self.bad_rows.reasons.update(found.reasons)
        self.bad_rows.first = [*self.bad_rows.first, *found.first][:10]

    def judge(self, on_bad_file: str) -> None:
        """Raise where what was left out may not be left out."""
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
        """What a user should hear at the end."""
        result = self.result()
        if self.bad_files:
            yield Notice(message=self.bad_files.sentence(), level="warning")
        made = result["retokenized"]
        if made["rollouts"]:
            yield Notice(
                message=f"{made['rollouts']:,} rollouts ({made['tokens']:,} tokens) were made of text: token "
                "boundaries may differ from the policy's, and special tokens that the text lacks are not in them",
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
        """Bad rows of this run, and of sources that an earlier one converted."""
        kept = [entry["bad_rows"] for entry in self.entries]
        reasons: dict[str, int] = {}
        for summary in kept:
            for reason, count in summary["reasons"].items():
                reasons[reason] = reasons.get(reason, 0) + count
        first = [row for summary in kept for row in summary["first"]][:10]
        return {"count": sum(summary["count"] for summary in kept), "reasons": reasons, "first": first}


def _joined(tables: list[pa.Table]) -> pa.Table:
    """Tables of one source, of the same columns or with nulls where they differ."""
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def _made(retokenizer: Retokenizer | None) -> dict[str, int]:
    if retokenizer is None:
        return {"rollouts": 0, "tokens": 0}
    return {"rollouts": retokenizer.rollouts, "tokens": retokenizer.tokens}


def _what_it_depends_on(settings: ConvertSettings) -> dict[str, Any]:
    """Settings that change the result; on which files are left out depends nothing of what stands."""
    return {
        "--from": settings.reading.source_format,
        "--column": settings.reading.column,
        "--on-bad-rows": settings.reading.on_bad_rows,
        "--tokenizer": settings.reading.tokenizer,
        "--allow-retokenize": settings.reading.allow_retokenize,
    }
