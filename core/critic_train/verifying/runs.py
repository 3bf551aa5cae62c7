"""Whether a run is whole: its records, every checkpoint, its best, and whether data and model are still the same."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from critic_train.data.shards import find_shards, fingerprint
from critic_train.errors import CriticTrainError
from critic_train.run.checkpoint import checkpoints, inspect, resolve_model
from critic_train.run.model_digest import model_digest
from critic_train.verifying.finding import Finding


def verify_run(path: Path) -> Iterator[Finding]:
    """Findings of a run, one by one. What a run that goes on meanwhile prunes is no fault."""
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
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
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
    from critic_train.verifying.models import verify_model  # brings torch, for which rollouts need not wait

    folder = path / "checkpoints"
    whole = set()
    for checkpoint in checkpoints(folder):
        found = inspect(checkpoint)
        if not checkpoint.exists():
            continue  # pruned by the run that goes on
        if found.kind == "whole":
            whole.add(checkpoint.name)
            yield verify_model(checkpoint)
        else:
            yield Finding(checkpoint.name, "unsound", f"{found.kind}: {found.fault}")
    if not whole:
        yield Finding("checkpoints", "unsound", "there is no whole checkpoint")
    for aside in sorted(folder.glob("damaged-*")):
        yield Finding(aside.name, "unknown", "set aside as damaged when the run went on; may be removed")
    best = path / "best"
    if best.is_symlink():
        name = best.readlink().name
        if name in whole:
            yield Finding("best", "sound", f"leads to {name}")
        else:
            yield Finding("best", "unsound", f"leads to {name}, which is no whole checkpoint")


def _data(what: str, sources: list[str], before: dict[str, Any]) -> Finding:
    try:
        now = fingerprint(find_shards(sources))
    except CriticTrainError as error:
        return Finding(what, "unknown", f"not there to be compared: {error.message.splitlines()[0]}")
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
