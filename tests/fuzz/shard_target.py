"""One file, any bytes: it is read as rollouts, refused with words, and never anything else.

    PYTHONPATH=core python tests/fuzz/shard_target.py tests/fuzz/corpus     # under atheris (pip install atheris)

`tests/fuzz/run.py` drives the same function with its own mutations, in processes of their own.
"""

import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from critic_train.data.reading import RolloutReader, RowLimits
from critic_train.data.schema import Needs
from critic_train.data.shards import find_shards
from critic_train.errors import DataError

LIMITS = RowLimits(vocab_size=60, max_length=4096)
LARGEST = math.sqrt(3.4028234663852886e38)
ORACLE_ROWS = 5000
READ = ("input_ids", "response_mask", "returns", "values")


class WrongError(AssertionError):
    """Something was accepted, or refused, that should not have been."""


def one_file(content: bytes, folder: str) -> str:
    """Read a file and hold what came of it against plain Python.

    Args:
        content: of the file.
        folder: where it is put.

    Returns:
        "refused" where the whole file was, "read" where some rows of it were used and equal the reference's,
        "unchecked" where there is nothing to hold them against.

    Raises:
        WrongError: a row was accepted whose arrays disagree, or changed on the way.
        Exception: anything that is no DataError is a fault of ours.
    """
    path = os.path.join(folder, "a.parquet")
    Path(path).write_bytes(content)
    try:
        reader = RolloutReader(find_shards([path]), on_bad_rows="skip", limits=LIMITS, needs=Needs(values=False))
        found = {}
        for batch in reader:
            _check(batch)
            for place, (start, stop) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
                found[int(batch.row[place])] = {
                    "ids": batch.input_ids[start:stop].tolist(),
                    "mask": batch.response_mask[start:stop].tolist(),
                    "returns": batch.returns[start:stop].tolist(),
                    "values": None if batch.values is None else batch.values[start:stop].tolist(),
                }
    except DataError as refused:
        if not refused.message:
            raise WrongError("refused without a word") from refused
        return "refused"
    rows = _plain(path)
    if rows is None:
        return "unchecked"
    expected = {number: row for number, row in enumerate(map(reference, rows)) if row is not None}
    if list(found) != list(expected):
        raise WrongError(f"rows {sorted(set(found) ^ set(expected))[:5]} were wrongly taken or left")
    for number, row in expected.items():
        if not _same(found[number], row):
            raise WrongError(f"row {number} changed: {found[number]} for {row}")
    return "read"


def _check(batch: Any) -> None:
    """What holds of every batch, wherever it came from."""
    tokens = len(batch.input_ids)
    sizes = {len(batch.response_mask), len(batch.returns), tokens if batch.values is None else len(batch.values)}
    if sizes != {tokens} or batch.offsets[-1] != tokens or (batch.offsets[1:] <= batch.offsets[:-1]).any():
        raise WrongError("the arrays of a batch disagree")
    if batch.response_mask[batch.offsets[:-1]].any() or not batch.response_counts.all():
        raise WrongError("a rollout without a prompt or a response")
    if batch.input_ids.min() < 0 or batch.input_ids.max() >= 60:
        raise WrongError("an id outside the vocabulary")


def _plain(path: str) -> list[dict[str, Any]] | None:
    """All rows by another way into Arrow; None where it does not go, or is too long."""
    try:
        footer = pq.read_metadata(path)
        names = [name for name in READ if name in pq.read_schema(path).names]
        if footer.num_rows > ORACLE_ROWS or len(names) < len(READ):
            return None
        read: list[dict[str, Any]] = pq.read_table(
            path, columns=names, page_checksum_verification=True, use_threads=False, pre_buffer=False
        ).to_pylist()
        return read
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return None


def reference(row: dict[str, Any]) -> dict[str, Any] | None:
    """One row in plain Python; None where it cannot be used."""
    ids, mask = row["input_ids"], row["response_mask"]
    if any(row[name] is None for name in READ) or None in ids or None in mask:
        return None
    if not ids or not all(0 <= token < 60 for token in ids) or len(ids) > 4096:
        return None
    if not mask or len(mask) > len(ids) or any(entry not in (0, 1) for entry in mask):
        return None
    start = len(ids) - len(mask) if len(mask) < len(ids) else None
    mask = [False] * (len(ids) - len(mask)) + [bool(entry) for entry in mask]
    if True not in mask or mask[0]:
        return None
    start = mask.index(True) if start is None else start
    result: dict[str, Any] = {"ids": ids, "mask": mask}
    for name in ("returns", "values"):
        column = row[name]
        if len(column) == len(ids) - start and len(column) != len(ids):
            column = [0.0] * start + column
        elif len(column) != len(ids):
            return None
        column = [x if entry else 0.0 for x, entry in zip(column, mask, strict=True)]
        if any(x is None or not abs(x) <= LARGEST for x in column):
            return None
        result[name] = column
    return result


def _same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    if found["ids"] != expected["ids"] or found["mask"] != expected["mask"]:
        return False
    return all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-44)
        for name in ("returns", "values")
        for a, b in zip(found[name], expected[name], strict=True)
    )


def main() -> None:
    """Let atheris mutate the corpus until something goes wrong."""
    import atheris

    with tempfile.TemporaryDirectory() as folder:

        def one_input(content: bytes) -> None:
            one_file(content, folder)

        atheris.instrument_all()  # or it sees no coverage, and keeps nothing of the corpus
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
