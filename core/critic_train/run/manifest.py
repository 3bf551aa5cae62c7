"""What identifies files and programs: a checkpoint's manifest, a fingerprint of a base model, versions for records.

A directory with a valid manifest is a complete checkpoint. One that disagrees with its manifest is damaged. One without
a manifest is incomplete: it was copied or removed in part, since critic-train writes the manifest before the rename.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from critic_train import __version__
from critic_train.jsonio import read_json_object
from critic_train.run.storage import sha256, write_json


def versions() -> dict[str, str]:
    """Name -> version, of this program, of Python and of the libraries that a result depends on."""
    names = ("torch", "transformers", "pyarrow", "numpy", "safetensors")
    return {
        "critic-train": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


SAMPLES = 64
SAMPLE_BYTES = 65_536


def model_digest(path: Path) -> dict[str, Any]:
    """Sizes and sampled digests of a model directory's weights and configuration.

    64 evenly spaced pieces of 64 KiB of each file are hashed (all of a small file): enough to notice another model
    or another training stage, not enough to notice one flipped bit.

    Returns:
        {"files": {name: {"bytes", "sampled_sha256"}}}, JSON-able. It does not depend on the directory's path.
    """
    names = sorted(p for p in path.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    skipped = ("optimizer.safetensors", "optimizer_weights.safetensors")
    return {"files": {p.name: _sampled(p) for p in names if p.name not in skipped}}


def tokenizer_digest(path: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 (hex) of those of the named files that a model directory has."""
    return {name: sha256(path / name) for name in sorted(names) if (path / name).is_file()}


def _sampled(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for sample in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return {"bytes": size, "sampled_sha256": digest.hexdigest()}


FORMAT_VERSION = 1
READABLE_SINCE = "0.1.0"
"""The first critic-train that reads checkpoints of FORMAT_VERSION."""
MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**24
"""No manifest of ours is longer; what is longer is not read."""
STATE_FILES = ("optimizer", "trainer.json")
"""Beginnings of the names of files that only a resumed run needs, and no one who uses the critic."""


@dataclass(frozen=True, slots=True)
class Condition:
    """The condition of a checkpoint directory.

    Attributes:
        kind: "complete", "damaged", "incomplete", or "newer": in the format of a later critic-train.
        fault: the reason, as text; empty where it is complete.
    """

    kind: Literal["complete", "damaged", "incomplete", "newer"]
    fault: str = ""


def write_manifest(directory: Path, step: int) -> None:
    """Write the manifest of a directory whose files have all been synced.

    Raises:
        OSError: the disk is full or not writable.
    """
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    record = {
        "format_version": FORMAT_VERSION,
        "written_by": __version__,
        "readable_since": READABLE_SINCE,
        "step": step,
        "files": {
            file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in files
        },
    }
    write_json(directory / MANIFEST, record)


def condition(directory: Path, *, digests: bool = True, state: bool = True) -> Condition:
    """Compare a checkpoint with its manifest.

    Args:
        directory: the checkpoint.
        digests: whether to read all content; otherwise only sizes are compared.
        state: whether to compare the optimizer and trainer state.
    """
    try:
        recorded = _read(directory / MANIFEST)
    except FileNotFoundError:
        return Condition("incomplete", f"{MANIFEST} is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Condition("damaged", f"{MANIFEST} cannot be read: {error}")
    if recorded["format_version"] > FORMAT_VERSION:
        writer, since = recorded.get("written_by", "(unknown)"), recorded.get("readable_since", "(unknown)")
        return Condition("newer", f"written by critic-train {writer}, needs >= {since}; this is {__version__}")
    for name, entry in recorded["files"].items():
        if state or not name.startswith(STATE_FILES):
            try:
                fault = _fault(directory, name, entry, digests)
            except (OSError, ValueError) as error:
                fault = f"{name} cannot be read: {error}"
            if fault:
                return Condition("damaged", fault)
    return Condition("complete")


def recorded_step(directory: Path) -> int | None:
    """The step that a manifest names, None where there is no manifest to read."""
    try:
        step = _read(directory / MANIFEST).get("step")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _read(path: Path) -> dict[str, Any]:
    """Raises OSError, ValueError, KeyError or TypeError where it is not a manifest."""
    if path.stat().st_size > MANIFEST_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes")
    recorded = read_json_object(path)
    version = recorded["format_version"]
    if type(version) is not int or version < 1:
        raise ValueError(f"format version {version!r}")
    if version == FORMAT_VERSION:
        for name, entry in dict(recorded["files"]).items():
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise TypeError(f"the entry of {name} is not of bytes and sha256")
    return recorded


def _fault(directory: Path, name: str, entry: dict[str, Any], digests: bool) -> str:
    file = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{MANIFEST} names a file outside the checkpoint: {name!r}"
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != entry["bytes"]:
        return f"{name} has {file.stat().st_size} bytes, {entry['bytes']} were written"
    if digests and sha256(file) != entry["sha256"]:
        return f"the content of {name} has changed since it was written"
    return ""
