"""Make a spool: columns appended batch by batch, an index at the end, the whole renamed into place."""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from critic_train.data.labels import prompt_keys
from critic_train.data.spool import COLUMNS, FORMAT_VERSION, INDEX, OPTIONAL, Spool, bytes_of
from critic_train.rollouts import Rollouts
from critic_train.run.storage import File, make_directory, remove, remove_tree, rename, sync_directory, write_file


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
        self._files: dict[str, File] = {}
        self._lengths: list[NDArray[np.int64]] = []
        self._parts: dict[str, list[NDArray[np.generic]]] = {name: [] for name in INDEX if name != "offsets"}
        self._max_token_id = -1
        self._lacking: set[str] = set()
        self._abandoned = False

    def __enter__(self) -> "SpoolWriter":
        remove_tree(self._temporary)
        make_directory(self._temporary)
        try:
            for name in COLUMNS:
                self._files[name] = File(self._temporary / name, "create")
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def add(self, batch: Rollouts) -> None:
        """Keep some more rollouts. Values and rewards are kept only if every batch has them.

        Raises:
            OSError: the disk is full or not writable.
        """
        self._lacking |= {name for name in OPTIONAL if getattr(batch, name) is None}
        for name, file in self._files.items():
            column = getattr(batch, name)
            if column is not None:
                file.write(bytes_of(np.ascontiguousarray(column, dtype=COLUMNS[name])))
        counts = batch.response_counts
        owner = np.repeat(np.arange(len(batch)), counts)
        masked = batch.returns[batch.response_mask].astype(np.float64)
        self._lengths.append(batch.lengths)
        self._parts["groups"].append(batch.group)
        self._parts["prompts"].append(prompt_keys(batch))
        self._parts["rows"].append(batch.row)
        self._parts["response_counts"].append(counts)
        self._parts["return_sums"].append(np.bincount(owner, weights=masked, minlength=len(batch)))
        cut = np.zeros(len(batch), dtype=np.bool_) if batch.truncated is None else batch.truncated
        self._parts["truncated"].append(cut)
        self._max_token_id = max(self._max_token_id, int(batch.input_ids.max(initial=-1)))

    def abandon(self) -> None:
        """Leave nothing behind when the `with` block ends."""
        self._abandoned = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            whole = error is None and not self._abandoned
            for file in self._files.values():
                with file:
                    if whole:
                        file.sync()
            if whole:
                self._write_index()
                sync_directory(self._temporary)
                remove_tree(self._target)
                rename(self._temporary, self._target)
                sync_directory(self._target.parent)
        finally:
            remove_tree(self._temporary)

    def _write_index(self) -> None:
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), *self._lengths]).cumsum()
        _save(self._temporary / "offsets.npy", offsets)
        for name, pieces in self._parts.items():
            _save(self._temporary / f"{name}.npy", np.concatenate([np.zeros(0, dtype=INDEX[name]), *pieces]))
        for name in self._lacking:
            remove(self._temporary / name)
        meta = {
            "format_version": FORMAT_VERSION,
            "max_token_id": self._max_token_id,
            "columns": [name for name in COLUMNS if name not in self._lacking],
        }
        write_file(self._temporary / "meta.json", json.dumps(meta).encode())


def _save(path: Path, array: NDArray[np.generic]) -> None:
    with io.BytesIO() as held:
        np.save(held, array)
        write_file(path, held.getvalue())
