"""A run's on-disk copy of its checked rollouts, from which any rollout is read in one seek.

Training takes rollouts in shuffled order, over and over; Parquet is made for reading from front to back. So the
rollouts are read once and written as flat columns, one file each, with an index; the directory is renamed to its final
name when it is complete. Reads are positioned reads into fresh arrays, not memory maps, so resident memory stays flat
however large the data is.
"""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.data.labels import prompt_keys
from critic_train.jsonio import read_json_object
from critic_train.rollouts import Rollouts, offsets_from_lengths
from critic_train.run.storage import (
    File,
    StagedFile,
    make_directory,
    remove,
    remove_tree,
    rename_durably,
    sync_directory,
    write_file,
)

FORMAT_VERSION = 3
COLUMNS: dict[str, type[np.generic]] = {
    "input_ids": np.int32,
    "response_mask": np.bool_,
    "returns": np.float32,
    "values": np.float32,
    "rewards": np.float32,
}
OPTIONAL = frozenset({"values", "rewards"})
"""Columns that are written only where every rollout has them."""
INDEX = {
    "offsets": np.int64,
    "groups": np.int64,
    "prompts": np.int64,
    "rows": np.int64,
    "response_counts": np.int64,
    "return_sums": np.float64,
    "truncated": np.bool_,
}


class CacheDamaged(ValueError):  # noqa: N818 - it names a state, not a programming error
    """The cache is absent, incomplete or of another version."""


class RolloutCache:
    """Rollouts on disk. Open one with `RolloutCache.open`, make one with `write_cache` or `CacheWriter`.

    Attributes:
        offsets: int64 [n+1], first token of every rollout in the column files.
        groups: int64 [n], prompt group keys.
        prompts: int64 [n], keys of the tokens before the response.
        rows: int64 [n], rows in the data set as read.
        response_counts: int64 [n], masked tokens.
        return_sums: float64 [n], sum of the returns over masked tokens.
        max_token_id: the largest id.
        truncated: bool [n], rollouts marked truncated.
        columns: the token columns in the cache.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            meta = read_json_object(directory / "meta.json")
            if meta["format_version"] != FORMAT_VERSION:
                raise CacheDamaged(f"{directory} has format version {meta['format_version']}")
            index = {name: np.load(directory / f"{name}.npy", allow_pickle=False) for name in INDEX}
            self.max_token_id = int(meta["max_token_id"])
            self.columns = [str(name) for name in meta["columns"]]
        except CacheDamaged:
            raise
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise CacheDamaged(f"{directory}: {error}") from error
        self.offsets: NDArray[np.int64] = index["offsets"]
        self.groups: NDArray[np.int64] = index["groups"]
        self.prompts: NDArray[np.int64] = index["prompts"]
        self.rows: NDArray[np.int64] = index["rows"]
        self.response_counts: NDArray[np.int64] = index["response_counts"]
        self.return_sums: NDArray[np.float64] = index["return_sums"]
        self.truncated: NDArray[np.bool_] = index["truncated"]
        sizes = {name: column.shape for name, column in index.items()}
        if any(shape != (len(self.offsets) - (name != "offsets"),) for name, shape in sizes.items()):
            raise CacheDamaged(f"{directory}: its index disagrees on the number of rollouts")
        for name in self.columns:
            expected = self.num_tokens * np.dtype(COLUMNS[name]).itemsize
            file = directory / name
            if not file.is_file() or file.stat().st_size != expected:
                raise CacheDamaged(f"{file} is missing or has the wrong size")

    @classmethod
    def open(cls, directory: Path) -> "RolloutCache":
        """Open a complete cache.

        Raises:
            CacheDamaged: there is none, or it is incomplete.
        """
        return cls(directory)

    @property
    def has_values(self) -> bool:
        """Whether stored values are in the cache."""
        return "values" in self.columns

    @property
    def num_rollouts(self) -> int:
        """Number of rollouts."""
        return len(self.groups)

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [n], tokens of each rollout."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def max_length(self) -> int:
        """Tokens of the longest rollout."""
        return int(self.lengths.max(initial=0))

    def read(self, index: NDArray[np.int64], values_from: str | None = None) -> Rollouts:
        """Read rollouts in the order given.

        Args:
            index: int64 [m], positions in the cache.
            values_from: an extra column to take as `values` in place of the stored ones.
        """
        offsets = offsets_from_lengths(self.lengths[index])
        names = [name for name in self.columns if name != "values"]
        columns = {name: self._read_column(name, COLUMNS[name], index, offsets) for name in names}
        values_from = values_from or ("values" if self.has_values else None)
        values = None if values_from is None else self._read_column(values_from, np.float32, index, offsets)
        return Rollouts(
            input_ids=columns["input_ids"],
            offsets=offsets,
            response_mask=columns["response_mask"],
            returns=columns["returns"],
            values=values,
            group=self.groups[index],
            row=self.rows[index],
            rewards=columns.get("rewards"),
            truncated=self.truncated[index] if "rewards" in columns else None,
        )

    def read_column(self, name: str, kind: type[np.generic], index: NDArray[np.int64]) -> NDArray[Any]:
        """An extra column of some rollouts, end to end in the order given.

        Args:
            name: the column.
            kind: its dtype, as it was written.
            index: int64 [m], positions in the cache.
        """
        return self._read_column(name, kind, index, offsets_from_lengths(self.lengths[index]))

    def positions_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [m], positions in the cache of the rollouts with these rows in the data set."""
        return np.searchsorted(self.rows, rows)

    def new_column(self, name: str, kind: type[np.generic] = np.float32) -> "ColumnWriter":
        """Write one more column, in any order; it stands when the `with` block ends without an error."""
        return ColumnWriter(self, name, kind)

    def has_column(self, name: str) -> bool:
        """Whether an extra column stands."""
        return (self.directory / name).is_file()

    def drop_column(self, name: str) -> None:
        """Remove an extra column, if it stands."""
        assert name not in COLUMNS
        remove(self.directory / name)

    def _read_column(
        self, name: str, kind: type[np.generic], index: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> NDArray[Any]:
        column: NDArray[Any] = np.empty(int(offsets[-1]), dtype=kind)
        view, width = bytes_of(column), column.itemsize
        descriptor = os.open(self.directory / name, os.O_RDONLY)
        try:
            for first, last in _neighbours(index):
                begin, end = int(offsets[first]) * width, int(offsets[last + 1]) * width
                position = int(self.offsets[index[first]]) * width
                while begin < end:
                    got = os.preadv(descriptor, [view[begin:end]], position)
                    if got == 0:
                        raise CacheDamaged(f"{self.directory / name} ended early")
                    begin, position = begin + got, position + got
        finally:
            os.close(descriptor)
        return column


class ColumnWriter:
    """One extra column of a cache while it is being written."""

    def __init__(self, cache: RolloutCache, name: str, kind: type[np.generic]) -> None:
        self._cache = cache
        self._kind = kind
        self._width = np.dtype(kind).itemsize
        self._target = cache.directory / name
        self._file: StagedFile | None = None

    def __enter__(self) -> "ColumnWriter":
        self._file = StagedFile(self._target)
        self._file.truncate(self._cache.num_tokens * self._width)
        return self

    def write(self, index: NDArray[np.int64], column: NDArray[Any]) -> None:
        """Write the tokens of some rollouts.

        Args:
            index: int64 [m], positions in the cache.
            column: of the column's dtype, the tokens of those rollouts end to end.

        Raises:
            ValueError: the column has more or fewer numbers than the rollouts have tokens.
            OSError: the disk is full.
        """
        tokens = int(self._cache.lengths[index].sum())
        if len(column) != tokens:
            raise ValueError(f"{len(column)} numbers for rollouts of {tokens} tokens")
        assert self._file is not None
        data = bytes_of(np.ascontiguousarray(column, dtype=self._kind))
        begin = 0
        for first, last in _neighbours(index):
            offset = int(self._cache.offsets[index[first]]) * self._width
            end = begin + int(self._cache.offsets[index[last] + 1]) * self._width - offset
            self._file.write_at(data[begin:end], offset)
            begin = end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.__exit__(kind, error, trace)


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array of any shape and dtype, without a copy."""
    return memoryview(array.view(np.uint8))  # type: ignore[arg-type]


def _neighbours(index: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ranges (first, last) of `index` whose rollouts are neighbours in the files."""
    if not len(index):
        return []
    breaks = np.flatnonzero(np.diff(index) != 1)
    firsts = [0, *(breaks + 1).tolist()]
    lasts = [*breaks.tolist(), len(index) - 1]
    return list(zip(firsts, lasts, strict=True))


def write_cache(directory: Path, batches: Iterable[Rollouts]) -> RolloutCache:
    """Write a stream of rollouts to a new cache.

    Raises:
        OSError: the disk is full or not writable.
    """
    with CacheWriter(directory) as writer:
        for batch in batches:
            writer.add(batch)
    return RolloutCache.open(directory)


class CacheWriter:
    """Writes a cache batch by batch; it is complete when the `with` block ends without an error.

    Args:
        directory: the cache's directory; an existing one is replaced.
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

    def __enter__(self) -> "CacheWriter":
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
        """Write some more rollouts. Values and rewards are in the cache only if every batch has them.

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
            complete = error is None and not self._abandoned
            for file in self._files.values():
                with file:
                    if complete:
                        file.sync()
            if complete:
                self._write_index()
                sync_directory(self._temporary)
                remove_tree(self._target)
                rename_durably(self._temporary, self._target)
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
