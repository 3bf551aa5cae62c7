"""What a page is about, as read from disk: the directories of runs, and what `eval --json` printed.

Every JSON object is a `Record` that knows where it stands, so that each figure on the page can be looked up again.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from critic_train.errors import ConfigError
from critic_train.text import fixed, interval


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as it takes to tell them apart; of those in between, not what all share."""
    parts = [PurePath(path).parts or (path,) for path in paths]
    for count in range(1, max((len(p) for p in parts), default=1) + 1):
        ends = [p[-count:] for p in parts]
        if len(set(ends)) == len(set(paths)):
            same_length = all(len(end) == count for end in ends)
            shared = [k for k in range(1 - count, -1) if same_length and len({end[k] for end in ends}) == 1]
            places = [k for k in range(-count, 0) if k not in shared]
            return ["/".join(end[k] for k in places if len(end) >= -k).removeprefix("//") for end in ends]
    return list(paths)


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure as the page shows it.

    Attributes:
        text: what is read.
        value: the figure itself as JSON text, empty where there is none.
        at: where it stands: source, file and JSON pointer (RFC 6901), as in `1:metrics.jsonl:12#/lr`.
    """

    text: str
    value: str = ""
    at: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object and where it stands. What is missing in it is an empty record, not an error.

    Attributes:
        data: the object.
        at: where it stands, as in `Cell.at`.
    """

    data: Mapping[str, Any]
    at: str

    def __bool__(self) -> bool:
        return bool(self.data)

    def get(self, key: str) -> Any:
        """The plain value under a key, None where there is none."""
        return self.data.get(key)

    def part(self, key: str) -> "Record":
        """The object under a key, empty where there is none."""
        inner = self.data.get(key)
        return Record(inner if isinstance(inner, Mapping) else {}, pointer(self.at, key))

    def parts(self) -> "dict[str, Record]":
        """The objects under all keys."""
        return {key: self.part(key) for key, value in self.data.items() if isinstance(value, Mapping)}

    def rows(self, key: str) -> "list[Record]":
        """The objects of the list under a key."""
        inner = self.data.get(key)
        at = pointer(self.at, key)
        if not isinstance(inner, list):
            return []
        return [Record(row, pointer(at, i)) for i, row in enumerate(inner) if isinstance(row, Mapping)]

    def cell(self, key: str, how: Callable[[Any], str] = fixed) -> Cell:
        """The figure under a key, written by `how`; without `at` where it does not exist."""
        value = self.data.get(key)
        if value is None:
            return Cell(how(None))
        return Cell(how(value), json.dumps(value), pointer(self.at, key))

    def bounds(self, key: str) -> Cell:
        """The interval under a key."""
        return self.cell(key, interval)


def pointer(at: str, key: str | int) -> str:
    """One step further along a JSON pointer."""
    return f"{at}/{str(key).replace('~', '~0').replace('/', '~1')}"


EVALUATION = "evaluation.json"
"""The file of a run that holds the verdict on its best critic, complete, in the form of eval's result."""

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
NEITHER = "give a run's directory (--out of fit) or a file that critic-train eval --json wrote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One run or one evaluation.

    Attributes:
        path: the run's directory, or the file; None where the result was never a file.
        label: what it is called on the page.
        started: run.json.
        result: result.json; empty while the run goes on.
        evaluation: the verdict on its best critic so far, in the form of eval's result; empty before the first.
        steps: one record a step, in order.
        evaluations: one record an evaluation, in order.
        timings: one record a step of what differs from run to run, in order.
    """

    path: Path | None
    label: str
    evaluation: Record
    started: Record = field(default_factory=lambda: Record({}, ""))
    result: Record = field(default_factory=lambda: Record({}, ""))
    steps: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    timings: list[Record] = field(default_factory=list)

    @property
    def is_run(self) -> bool:
        """Whether it is a training run."""
        return bool(self.started or self.steps)


def read_sources(paths: list[str]) -> list[Source]:
    """Read runs and evaluations.

    Args:
        paths: run directories and files of eval's JSON.

    Raises:
        ConfigError: one of them is neither; all such are named.
    """
    sources, errors = [], []
    for number, path in enumerate(dict.fromkeys(paths), start=1):
        try:
            sources.append(read_source(Path(path), number))
        except ConfigError as error:
            errors.append(error.message)
    if errors:
        raise ConfigError("\n".join(errors), hint=NEITHER)
    return sources


def read_source(path: Path, number: int = 1) -> Source:
    """Read one run or evaluation; `number` is its position on the page, from 1."""
    if path.is_dir():
        return read_run(path, number)
    if not path.exists():
        raise ConfigError(f"no run and no file {path}", hint=NEITHER)
    return read_evaluation(path, number)


def read_run(path: Path, number: int = 1) -> Source:
    """Read a run's directory, finished or not.

    Raises:
        ConfigError: it holds no run.
    """
    if not (path / "run.json").is_file():
        raise ConfigError(f"{path} holds no run: there is no run.json in it", hint=NEITHER)
    records = list(_lines(path / METRICS, f"{number}:{METRICS}"))
    return Source(
        path=path,
        label=str(path),
        started=_object(path, "run.json", number),
        result=_object(path, "result.json", number),
        evaluation=_object(path, EVALUATION, number),
        steps=[record for record in records if record.get("event") == "step"],
        evaluations=[record for record in records if record.get("event") == "evaluation"],
        timings=list(_lines(path / TIMINGS, f"{number}:{TIMINGS}")),
    )


def reread_run(path: object) -> Source | None:
    """A run that has just ended, None where it left nothing to read."""
    try:
        return read_run(Path(path)) if isinstance(path, str) else None
    except ConfigError:
        return None


def read_evaluation(path: Path, number: int = 1) -> Source:
    """Read what `eval --json` printed.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        value = _loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint=NEITHER) from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}", hint=NEITHER) from error
    if not (isinstance(value, Mapping) and isinstance(value.get("critics"), Mapping)):
        raise ConfigError(f"{path} is no result of eval: it has no critics", hint=NEITHER)
    return evaluation_source(value, path, number)


def evaluation_source(result: Mapping[str, Any], path: Path | None = None, number: int = 1) -> Source:
    """eval's result as a source, read from `path` or still in memory."""
    name = path.name if path else "eval"
    critics = ", ".join(short_names([str(name) for name in result.get("models") or []])) or "stored values"
    return Source(
        path=path, label=str(path or f"evaluation of {critics}"), evaluation=Record(result, f"{number}:{name}#")
    )


def titles(sources: Sequence[Source]) -> list[str]:
    """What sources are called where there is little room."""
    short = iter(short_names([source.label for source in sources if source.path is not None]))
    return [source.label if source.path is None else next(short) for source in sources]


def _loads(text: str | bytes) -> Any:
    """JSON; NaN and infinities, which are none but which some write, become None."""
    return json.loads(text, parse_constant=lambda _: None)


def _object(folder: Path, name: str, number: int) -> Record:
    try:
        value = _loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    return Record(value if isinstance(value, Mapping) else {}, f"{number}:{name}#")


def _lines(path: Path, at: str) -> Iterator[Record]:
    """The objects of a JSONL file; the line that a running or killed process has half written is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for number, line in enumerate(lines, start=1):
        try:
            value = _loads(line)
        except ValueError:
            continue
        if isinstance(value, Mapping):
            yield Record(value, f"{at}:{number}#")


PAGE = "report.html"


def default_page_path(sources: Sequence[Source]) -> Path:
    """report.html in the run, the evaluation's file as .html, or ./report.html where there are several sources."""
    [first, *others] = sources
    if others or first.path is None:
        return Path(PAGE)
    return first.path / PAGE if first.is_run else first.path.with_suffix(".html")


def check_page_path(path: Path, flag: str) -> None:
    """Check that a page can be written to a path.

    Raises:
        ConfigError: it is a folder, or its folder is missing.
    """
    if path.is_dir():
        raise ConfigError(f"{flag}: {path} is a folder", hint=f"name a file in it, as in {path / PAGE}")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag}: no folder {path.parent}", hint="make it first, or name another place")
