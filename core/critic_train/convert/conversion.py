"""`critic-train convert`, from top to bottom: find files, recognise formats, read, make canonical, write."""

import difflib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from critic_train.convert.chat import Retokenizer
from critic_train.convert.converted_folder import STAGED, ConvertedFolder
from critic_train.convert.dump_files import Source, find_sources, metadata_files
from critic_train.convert.fields import TEXT_PARTS
from critic_train.convert.formats import Options
from critic_train.convert.source_conversion import (
    Outcome,
    SourceProcesses,
    SourceWork,
    convert_source,
    require_processors,
)
from critic_train.data.bad_input import BadFiles, BadRows
from critic_train.data.groups import grouping_renames
from critic_train.data.schema import ALIASES
from critic_train.errors import DataError
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.settings import ConvertSettings, column_renames
from critic_train.stopping import StopRequest

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
    check_parts(column_renames(settings.reading.column))
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
    nproc = settings.reading.nproc
    require_processors(nproc)
    with ConvertedFolder(Path(settings.output.to), _relevant_settings(settings)) as folder:
        work = _Work(folder=folder, options=options, on_bad_rows=settings.reading.on_bad_rows)
        yield from metadata_notice(settings.reading.source)
        several = work.convert_on_processes(sources, nproc, stop) if min(nproc, len(sources)) > 1 else None
        yield from work.convert(sources, stop) if several is None else several
        if stop.requested:
            yield RunEnded(status="interrupted", result=work.result(), signal_number=stop.signal_number)
            return
        work.check(settings.reading.on_bad_file)
        yield from work.closing_notices()
        yield RunEnded(status="already finished" if work.all_recorded else "finished", result=work.result())


def check_parts(renames: dict[str, str]) -> None:
    """Raise DataError where a value of --column names no part of a rollout, whatever the sources hold."""
    parts = (*ALIASES, *TEXT_PARTS)
    unknown = next((name for name in renames if name not in parts), None)
    if unknown is not None:
        close = difflib.get_close_matches(unknown, parts, n=1)
        near = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(
            f"--column {unknown}={renames[unknown]}: there is no canonical column {unknown!r}{near}",
            hint=f"canonical columns: {', '.join(parts)}",
        )


def metadata_notice(names: list[str]) -> Iterator[Notice]:
    """Name the files of the sources' folders that are not read."""
    files = metadata_files(names)
    if files:
        more = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
        yield Notice(message=f"{files[0]}{more} hold no rollouts, by their names, and are not read")


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

    def convert(self, sources: list[Source], stop: StopRequest) -> Iterator[Event]:
        """Convert the sources one after the other; a bad file is collected, to be reported at the end."""
        for source in sources:
            entry = self._recorded(source)
            if entry is None:
                prefix = self.folder.prefix_of(source.name)
                outcome = yield from convert_source(
                    source, self.folder.path, prefix, self.options, self.on_bad_rows, stop
                )
                yield from self._take(source.name, outcome)
            else:
                self.entries.append(entry)
            if stop.requested:
                return

    def convert_on_processes(self, sources: list[Source], count: int, stop: StopRequest) -> Iterator[Event]:
        """The same on several processes. What they made is taken in the order of the sources, under the same names."""
        entries = {source.name: self._recorded(source) for source in sources}
        work = SourceWork(folder=self.folder.path, options=self.options, on_bad_rows=self.on_bad_rows)
        with SourceProcesses(min(count, len(sources)), work) as processes:
            for number, source in enumerate(sources):
                if entries[source.name] is None:
                    processes.submit(source, f"{STAGED}{number:04d}")
            for number, source in enumerate(sources):
                entry = entries[source.name]
                outcome = None
                while entry is None and outcome is None:
                    if stop.requested:
                        return
                    outcome = processes.outcome(source, seconds=0.2)
                    stage = f"converting on {count} processes"
                    yield Progress(stage=stage, done=number, total=len(sources), unit="files")
                if outcome is not None:
                    yield from self._take(source.name, outcome)
                elif entry is not None:
                    self.entries.append(entry)

    def _recorded(self, source: Source) -> dict[str, Any] | None:
        """What is recorded of a source whose shards stand; None where it is to be converted."""
        try:
            entry = self.folder.recorded(source.name, source.stamp)
        except OSError:
            return None  # the conversion reports it
        self.all_recorded &= entry is not None
        return entry

    def _take(self, name: str, outcome: Outcome) -> Iterator[Event]:
        """Record what came of a source, and tell what was understood: of files that are read alike, of the first."""
        if outcome.bad_file is not None:
            self.bad_files.add(outcome.bad_file)
        more = outcome.bad_rows
        self.bad_rows.count += more.count
        self.bad_rows.reasons.update(more.reasons)
        self.bad_rows.first = [*self.bad_rows.first, *more.first][:FIRST_BAD_ROWS]
        for sentence in outcome.sentences:
            key = sentence.removeprefix(name)
            if key not in self.notices:
                self.notices[key] = None
                yield Notice(message=sentence)
        if outcome.entry is not None:
            self.entries.append(self.folder.record(outcome.entry))

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
            "next": f"critic-train fit --data {shlex.quote(str(self.folder.path))} --returns {returns}{old_values}",
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
