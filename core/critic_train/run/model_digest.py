"""A fingerprint of a base model that is cheap however large the model is."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from critic_train.run.durable import sha256

SAMPLES = 64
SAMPLE_BYTES = 65_536


def model_digest(path: Path) -> dict[str, Any]:
    """Sizes and sampled digests of a model directory's weights and configuration.

    64 evenly spaced pieces of 64 KiB of each file are hashed (all of a small file): enough to notice another model
    or another training stage, not enough to notice one flipped bit.

    Returns:
        {"files": {name: {"bytes", "sampled_sha256"}}}, JSON-able. The directory's place does not enter.
    """
    names = sorted(p for p in path.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    skipped = "optimizer.safetensors"
    return {"files": {p.name: _sampled(p) for p in names if p.name != skipped}}


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
