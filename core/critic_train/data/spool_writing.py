"""Make a spool: columns appended batch by batch, an index at the end, the whole renamed into place."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from critic_train.data.spool import COLUMNS, FORMAT_VERSION, INDEX, Spool, bytes_of
from critic_train.rollouts import Rollouts


def write_spool(directory: Path, batches: Iterable[Rollouts]) -> Spool:
    """Keep a stream of rollouts.

    Raises:
        OSError: the disk is full or not writable.
    """
    with SpoolWriter(directory) as writer:
        for batch in batches:
            writer.add(batch)
    return Spool.open(directory)


class SpoolWriter:
    """A spool while it is being written, batch by batch; it stands when the `with` block ends without an error.

    Args:
        directory: where the spool will stand; what stands there is replaced.
    """

    def __init__(self, directory: Path) -> None:
        self._target = directory
        self._temporary = directory.with_name(f".{directory.name}.tmp-{os.getpid()}")
        self._files: dict[str, BinaryIO] = {}
        self._lengths: list[NDArray[np.int64]] = []
        self._parts: dict[str, list[NDArray[np.generic]]] = {name: [] for name in INDEX if name != "offsets"}
        self._max_token_id = -1
        self._has_values = True
        self._abandoned = False

    def __enter__(self) -> "SpoolWriter":
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        self._files = {name: (self._temporary / name).open("wb") for name in COLUMNS}
        return self

    def add(self, batch: Rollouts) -> None:
        """Keep some more rollouts. Values are kept only if every batch has them.

        Raises:
            OSError: the disk is full or not writable.
        """
        self._has_values = self._has_values and batch.values is not None
        for name, file in self._files.items():
            column = getattr(batch, name)
            if column is not None:
                file.write(bytes_of(np.ascontiguousarray(column, dtype=COLUMNS[name])))
        counts = batch.response_counts
        owner = np.repeat(np.arange(len(batch)), counts)
        masked = batch.returns[batch.response_mask].astype(np.float64)
        self._lengths.append(batch.lengths)
        self._parts["groups"].append(batch.group)
        self._parts["rows"].append(batch.row)
        self._parts["response_counts"].append(counts)
        self._parts["return_sums"].append(np.bincount(owner, weights=masked, minlength=len(batch)))
        self._max_token_id = max(self._max_token_id, int(batch.input_ids.max(initial=-1)))

    def abandon(self) -> None:
        """Leave nothing behind when the `with` block ends."""
        self._abandoned = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for file in self._files.values():
                file.close()
            if error is None and not self._abandoned:
                self._write_index()
                shutil.rmtree(self._target, ignore_errors=True)
                self._temporary.rename(self._target)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _write_index(self) -> None:
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), *self._lengths]).cumsum()
        np.save(self._temporary / "offsets.npy", offsets)
        for name, pieces in self._parts.items():
            np.save(self._temporary / f"{name}.npy", np.concatenate([np.zeros(0, dtype=INDEX[name]), *pieces]))
        if not self._has_values:
            (self._temporary / "values").unlink()
        meta = {
            "format_version": FORMAT_VERSION,
            "max_token_id": self._max_token_id,
            "has_values": self._has_values,
        }
        (self._temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
