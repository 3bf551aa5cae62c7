"""`critic-train verify`: whether runs, checkpoints, models and rollouts are what was written.

Of a run: its records, every checkpoint, the best one, and whether its data and its base model are still the same.
"""

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from critic_train.data.bad_input import BadFiles
from critic_train.data.scanning import full_reader, read_through
from critic_train.data.shards import find_shards, fingerprint
from critic_train.errors import CriticTrainError, DataError, first_line
from critic_train.events import Event, Progress, RunEnded
from critic_train.jsonio import read_json_object
from critic_train.run.checkpoint import checkpoint_step, checkpoints, inspect, resolve_model
from critic_train.run.manifest import MANIFEST, model_digest
from critic_train.settings import VerifySettings
from critic_train.stopping import Stopped, StopRequest
from critic_train.verify.outcome import Finding


def verify_run(path: Path) -> Iterator[Finding]:
    """Findings of a run, one by one. Checkpoints that a running job removes meanwhile are passed over."""
    record, finding = _record(path / "run.json")
    yield finding
    if (path / "metrics.jsonl").exists():
        yield _log(path / "metrics.jsonl")
    if (path / "result.json").exists():
        yield _record(path / "result.json")[1]
    yield from _checkpoints(path)
    if record:
        for name, what in (("data", "rollouts"), ("val_data", "held-out rollouts")):
            if record.get(name):
                yield _data(what, record["settings"][name], record[name])
        if record.get("model"):
            yield _model(record["settings"]["model"], record["model"])


def _record(path: Path) -> tuple[dict[str, Any] | None, Finding]:
    try:
        value = read_json_object(path)
    except (OSError, ValueError) as error:
        return None, Finding(path.name, "unsound", f"cannot be read: {error}")
    return value, Finding(path.name, "sound", "readable")


def _log(path: Path) -> Finding:
    with path.open("rb") as file:
        count = 0
        for count, line in enumerate(file, start=1):
            try:
                json.loads(line)
            except ValueError as error:
                return Finding(path.name, "unsound", f"line {count} is no JSON: {error}")
    return Finding(path.name, "sound", f"{count:,} records")


def _checkpoints(path: Path) -> Iterator[Finding]:
    from critic_train.verify.model_checks import verify_model  # brings torch, for which rollouts need not wait

    folder = path / "checkpoints"
    complete = set()
    for checkpoint in checkpoints(folder):
        condition = inspect(checkpoint)
        if not checkpoint.exists():
            continue  # removed by the running job
        if condition.kind == "complete":
            complete.add(checkpoint.name)
            yield verify_model(checkpoint)
        else:
            yield Finding(checkpoint.name, "unsound", f"{condition.kind}: {condition.fault}")
    if not complete:
        yield Finding("checkpoints", "unsound", "there is no complete checkpoint")
    for aside in sorted(folder.glob("damaged-*")):
        yield Finding(aside.name, "unknown", "set aside as damaged when the run went on; may be removed")
    best = path / "best"
    if best.is_symlink():
        name = best.readlink().name
        if name in complete:
            yield Finding("best", "sound", f"links to {name}")
        else:
            yield Finding("best", "unsound", f"links to {name}, which is no complete checkpoint")


def _data(what: str, sources: list[str], before: dict[str, Any]) -> Finding:
    try:
        now = fingerprint(find_shards(sources))
    except CriticTrainError as error:
        return Finding(what, "unknown", f"not there to be compared: {first_line(error)}")
    if now["digest"] == before["digest"]:
        return Finding(what, "sound", f"{len(now['files'])} files, as when the run began")
    files = {name["name"]: name for name in before["files"]}
    changed = [file["name"] for file in now["files"] if files.pop(file["name"], None) != file] + list(files)
    return Finding(
        what, "unsound", f"changed since the run began: {', '.join(changed[:5]) or 'the order of the files'}"
    )


def _model(source: str, before: dict[str, Any]) -> Finding:
    path = Path(source)
    if not path.is_dir():
        return Finding("base model", "unknown", f"not there to be compared: {source}")
    try:
        now = model_digest(resolve_model(path))
    except CriticTrainError as error:
        return Finding("base model", "unsound", error.message)
    same = now == before
    return Finding("base model", "sound" if same else "unsound", "as when the run began" if same else "changed since")


def verify(settings: VerifySettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Look at runs, checkpoints, models and rollouts without changing anything.

    Args:
        settings: what to look at.
        stop: checked between findings and between batches of rows.

    Yields:
        Progress; RunEnded last, whose result is {"sound": bool, "targets": [{"target", "kind", "sound", "findings":
        [{"what", "state", "said"}]}]}. What cannot be read at all is a finding too, and raises nothing.
    """
    stop = stop or StopRequest()
    targets: list[dict[str, Any]] = []
    try:
        for number, name in enumerate(settings.reading.target):
            yield Progress(stage="verifying", done=number, total=len(settings.reading.target), unit="targets")
            targets.append((yield from _verify_target(name, settings.reading.column, stop)))
    except Stopped:
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)
        return
    yield RunEnded(status="finished", result={"sound": all(target["sound"] for target in targets), "targets": targets})


def _verify_target(name: str, column: list[str], stop: StopRequest) -> Generator[Event, None, dict[str, Any]]:
    """The entry of one target in the result of `verify`."""
    kind = kind_of(Path(name))
    findings: list[Finding] = []
    if kind == "rollouts":
        findings = yield from _rollouts(name, column, stop)
    else:
        for finding in (verify_run if kind == "run" else _one_model)(Path(name)):
            findings.append(finding)
            stop.check()
    return {
        "target": name,
        "kind": kind,
        "sound": all(finding.state != "unsound" for finding in findings),
        "findings": [{"what": each.what, "state": each.state, "said": each.message} for each in findings],
    }


def kind_of(path: Path) -> str:
    """Whether a path is a "run", a "checkpoint", a "model" (a Hugging Face directory) or "rollouts"."""
    if (path / "run.json").is_file() or (path / "checkpoints").is_dir():
        return "run"
    if path.is_dir() and ((path / MANIFEST).is_file() or checkpoint_step(path.resolve()) is not None):
        return "checkpoint"
    return "model" if (path / "config.json").is_file() else "rollouts"


def _one_model(path: Path) -> Iterator[Finding]:
    from critic_train.verify.model_checks import verify_model  # brings torch, for which rollouts need not wait

    yield verify_model(path)


def _rollouts(name: str, column: list[str], stop: StopRequest) -> Generator[Event, None, list[Finding]]:
    """Read everything: footers, pages and their checksums, every row's arrays."""
    bad_files = BadFiles()
    try:
        reader = full_reader(find_shards([name], bad_files), column, stop, bad_files)
        yield from read_through(reader, stop)
    except DataError as error:
        return _bad(bad_files) or [Finding(name, "unsound", error.message)]
    if reader.bad_rows.count:
        first = "".join(f"\n  {row}" for row in reader.bad_rows.first)
        return [*_bad(bad_files), Finding(name, "unsound", f"{reader.bad_rows.count:,} rows cannot be used{first}")]
    read = reader.files_read
    return [
        *_bad(bad_files),
        Finding(name, "sound", f"{len(read)} files and {sum(rows for _, rows in read):,} rows read"),
    ]


def _bad(bad_files: BadFiles) -> list[Finding]:
    return [Finding(file["file"], "unsound", file["fault"]) for file in bad_files.summary()["files"]]
