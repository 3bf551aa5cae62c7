"""`critic-train verify`, from top to bottom: what each target is, and whether it is what was written."""

from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from critic_train.data.bad_files import BadFiles
from critic_train.data.shards import find_shards
from critic_train.data.whole import read_through, whole_reader
from critic_train.errors import DataError
from critic_train.events import Event, Progress, RunEnded
from critic_train.run.checkpoint import checkpoint_step
from critic_train.run.manifest import MANIFEST
from critic_train.settings.verify import VerifySettings
from critic_train.stopping import StopRequest
from critic_train.verifying.finding import Finding
from critic_train.verifying.runs import verify_run


def verify(settings: VerifySettings, stop: StopRequest) -> Iterator[Event]:
    """Look at runs, checkpoints, models and rollouts without changing anything.

    Args:
        settings: what to look at.
        stop: looked at between findings and between batches of rows.

    Yields:
        Progress; RunEnded last, whose result is {"sound": bool, "targets": [{"target", "kind", "sound", "findings":
        [{"what", "state", "said"}]}]}. What cannot be read at all is a finding too, no error.
    """
    targets: list[dict[str, Any]] = []
    for number, name in enumerate(settings.target):
        yield Progress(stage="verifying", done=number, total=len(settings.target), unit="targets")
        kind = kind_of(Path(name))
        findings: list[Finding] = []
        looking = {"run": verify_run, "checkpoint": _one_model, "model": _one_model}.get(kind)
        for finding in looking(Path(name)) if looking else ():
            findings.append(finding)
            if stop.requested:
                break
        if looking is None:
            findings += yield from _rollouts(name, settings, stop)
        if stop.requested:
            yield RunEnded(status="interrupted", signal_number=stop.signal_number)
            return
        sound = all(finding.state != "unsound" for finding in findings)
        told = [asdict(finding) for finding in findings]
        targets.append({"target": name, "kind": kind, "sound": sound, "findings": told})
    yield RunEnded(status="finished", result={"sound": all(target["sound"] for target in targets), "targets": targets})


def kind_of(path: Path) -> str:
    """Whether a path is a "run", a "checkpoint", a "model" (a Hugging Face directory) or "rollouts"."""
    if (path / "run.json").is_file() or (path / "checkpoints").is_dir():
        return "run"
    if path.is_dir() and ((path / MANIFEST).is_file() or checkpoint_step(path.resolve()) is not None):
        return "checkpoint"
    return "model" if (path / "config.json").is_file() else "rollouts"


def _one_model(path: Path) -> Iterator[Finding]:
    from critic_train.verifying.models import verify_model  # brings torch, for which rollouts need not wait

    yield verify_model(path)


def _rollouts(name: str, settings: VerifySettings, stop: StopRequest) -> Generator[Event, None, list[Finding]]:
    """Read everything: footers, pages and their checksums, every row's arrays."""
    bad_files = BadFiles()
    try:
        reader = whole_reader(find_shards([name], bad_files), settings.column, stop, bad_files)
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
