"""The conversion of one source: its shards, and what is recorded of it."""

import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from critic_train.convert.canonical import Canonicaliser, groups_together
from critic_train.convert.chat import Retokenizer
from critic_train.convert.converted_folder import SourceShards
from critic_train.convert.dump_files import Source
from critic_train.convert.formats import Opened, Options, open_source
from critic_train.data.bad_input import BadFile, BadRows
from critic_train.errors import ConfigError, CriticTrainError, DataError, MachineError
from critic_train.events import Progress
from critic_train.stopping import StopRequest


@dataclass(slots=True)
class Outcome:
    """What came of a source.

    Attributes:
        entry: what is recorded of it; None where it has no shards.
        sentences: what was understood and left out, in sentences.
        bad_rows: rollouts that cannot be used.
        bad_file: why the file cannot be used.
    """

    entry: dict[str, Any] | None = None
    sentences: list[str] = field(default_factory=list)
    bad_rows: BadRows = field(default_factory=BadRows)
    bad_file: BadFile | None = None


def convert_source(
    source: Source, folder: Path, prefix: str, options: Options, on_bad_rows: str, stop: StopRequest
) -> Generator[Progress, None, Outcome]:
    """Write the shards of a source, or none of them.

    Args:
        source: the file.
        folder: of the conversion.
        prefix: what the shards' names begin with.
        options: how it is read.
        on_bad_rows: --on-bad-rows.
        stop: checked between pieces.

    Raises:
        OSError: the shards cannot be written.
    """
    outcome = Outcome()
    try:
        stamp = source.stamp
        with source.local() as local:
            opened = open_source(local, options)
            yield from _write(local, opened, folder, prefix, options, on_bad_rows, stop, outcome)
    except DataError as error:
        return Outcome(bad_file=BadFile.of(source.name, error, None))
    except OSError as error:
        if error.filename is None or str(error.filename) != str(source.path):
            raise
        reason = DataError(f"{source.name}: {error.strerror or error}")
        return Outcome(bad_file=BadFile.of(source.name, reason, None))
    if outcome.entry is not None:
        outcome.entry["stamp"] = stamp
    return outcome


def _write(
    source: Source,
    opened: Opened,
    folder: Path,
    prefix: str,
    options: Options,
    on_bad_rows: str,
    stop: StopRequest,
    outcome: Outcome,
) -> Iterator[Progress]:
    canonicaliser = Canonicaliser(
        name=source.name,
        renames=opened.renames,
        unit=opened.row_unit,
        group_by=options.group_by,
        understood=dict(opened.understood),
    )
    count_before = _retokenized(options.retokenizer)
    with SourceShards(folder, prefix) as shards:
        tables: list[pa.Table] = []
        for records, done in opened.records:
            table = canonicaliser.table(records)
            if table is not None:
                (tables.append if opened.in_memory else shards.write)(table)
            yield Progress(stage=f"converting {source.path.name}", done=done, total=opened.total, unit=opened.unit)
            if stop.requested:
                shards.drop()
                return
        if tables:
            shards.write(groups_together(_joined(tables)))
        canonicaliser.finish()
        outcome.bad_rows = canonicaliser.bad_rows
        read_as = f"{source.name} is read as {opened.format}"
        outcome.sentences = [read_as, canonicaliser.sentence(), *canonicaliser.notes]
        if canonicaliser.bad_rows.count and on_bad_rows == "fail":
            shards.drop()
            return
    count = _retokenized(options.retokenizer)
    outcome.entry = {
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


def _joined(tables: list[pa.Table]) -> pa.Table:
    """Tables of one source, of the same columns or with nulls where they differ."""
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def _retokenized(retokenizer: Retokenizer | None) -> dict[str, int]:
    if retokenizer is None:
        return {"rollouts": 0, "tokens": 0}
    return {"rollouts": retokenizer.rollouts, "tokens": retokenizer.tokens}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceWork:
    """What a process needs to convert sources."""

    folder: Path
    options: Options
    on_bad_rows: str


class _RemoteStop(StopRequest):
    """A stop that another process asks for, or its end."""

    def __init__(self, asked: Any, parent: int) -> None:
        super().__init__()
        self._asked = asked
        self._parent = parent

    @property
    def requested(self) -> bool:
        """Whether the job was asked to stop."""
        return bool(self._asked.is_set()) or os.getppid() != self._parent


class SourceProcesses:
    """Converts sources on several processes of this machine; `outcome` gives what came of each.

    The processes are forked: they start at once, with the tokenizer that was loaded. They write nothing but shards,
    under names of their own, and leave signals to this process.

    Args:
        count: how many processes.
        work: what they do.
    """

    def __init__(self, count: int, work: SourceWork) -> None:
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
        self._asked = context.Event()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._pool = ProcessPoolExecutor(count, context, _begin, (work, self._asked, os.getpid()))
        self._futures: dict[str, Future[Outcome | CriticTrainError]] = {}

    def __enter__(self) -> "SourceProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        self._asked.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, source: Source, prefix: str) -> None:
        """Have a source converted; its shards' names begin with `prefix`."""
        self._futures[source.name] = self._pool.submit(_convert, source, prefix)

    def outcome(self, source: Source, seconds: float) -> Outcome | None:
        """What came of a source, None where it is not done after so many seconds.

        Raises:
            CriticTrainError: what its process raised.
            MachineError: a process was killed.
        """
        try:
            result = self._futures[source.name].result(timeout=seconds)
        except TimeoutError:
            return None
        except BrokenProcessPool as error:
            raise MachineError(
                f"a process of --nproc ended while sources were converted ({source.name} or another)",
                hint="it may have been killed for memory: fewer --nproc",
            ) from error
        if isinstance(result, CriticTrainError):
            raise result
        return result


def require_processors(count: int) -> None:
    """Raise ConfigError where there are more processes than processors that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count > cores:
        raise ConfigError(f"--nproc {count}: this machine has {cores} processors", hint=f"--nproc {cores}")


_work: SourceWork
_stop: StopRequest


def _begin(work: SourceWork, asked: Any, parent: int) -> None:
    global _work, _stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _work, _stop = work, _RemoteStop(asked, parent)


def _convert(source: Source, prefix: str) -> Outcome | CriticTrainError:
    steps = convert_source(source, _work.folder, prefix, _work.options, _work.on_bad_rows, _stop)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
    except CriticTrainError as error:
        return error
