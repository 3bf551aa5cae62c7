"""What goes into a cache comes out again, in any order, or the cache says that it is damaged."""

import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from crashing import Fails
from support import branching_rollouts

from critic_train.data.rollout_cache import CacheDamaged, RolloutCache, write_cache
from critic_train.rollouts import Rollouts
from critic_train.run.storage import watched


def assert_same(one: Rollouts, other: Rollouts) -> None:
    for name in ("input_ids", "offsets", "response_mask", "returns", "values", "group", "row"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)


@pytest.fixture
def rollouts() -> Rollouts:
    return branching_rollouts(3)


@pytest.fixture
def cache(tmp_path: Path, rollouts: Rollouts) -> RolloutCache:
    pieces = np.array_split(np.arange(len(rollouts)), 4)
    return write_cache(tmp_path / "cache" / "train", (rollouts.take(piece) for piece in pieces))


def test_reads_back_any_order_with_repeats(cache: RolloutCache, rollouts: Rollouts) -> None:
    draw = np.random.default_rng(0)
    n = len(rollouts)
    runs = np.concatenate([np.arange(5, 9), np.arange(2, 4), np.arange(n - 3, n)])
    for index in (np.arange(n), runs, draw.integers(0, n, 50), np.array([3, 3, 4]), np.zeros(0, dtype=np.int64)):
        assert_same(cache.read(index), rollouts.take(index))


def test_knows_its_rollouts_without_reading_them(cache: RolloutCache, rollouts: Rollouts) -> None:
    assert [path.name for path in cache.directory.parent.iterdir()] == ["train"]
    again = RolloutCache.open(cache.directory)
    assert again.num_rollouts == len(rollouts)
    assert again.num_tokens == len(rollouts.input_ids)
    assert again.lengths.tolist() == rollouts.lengths.tolist()
    assert again.max_length == max(rollouts.lengths)
    assert again.max_token_id == max(rollouts.input_ids)
    assert again.groups.tolist() == rollouts.group.tolist()
    assert again.rows.tolist() == rollouts.row.tolist()
    for i, (start, stop) in enumerate(zip(rollouts.offsets[:-1], rollouts.offsets[1:], strict=True)):
        masked = [float(g) for g, m in zip(rollouts.returns, rollouts.response_mask, strict=True)][start:stop]
        kept = [g for g, m in zip(masked, rollouts.response_mask[start:stop], strict=True) if m]
        assert again.response_counts[i] == len(kept)
        assert again.return_sums[i] == pytest.approx(sum(kept), abs=1e-12)


def test_rollouts_without_values(tmp_path: Path, rollouts: Rollouts) -> None:
    half = len(rollouts) // 2
    with_some = [
        rollouts.take(np.arange(half)),
        replace(rollouts.take(np.arange(half, len(rollouts))), values=None),
    ]
    cache = write_cache(tmp_path / "s", with_some)
    assert not cache.has_values
    assert cache.read(np.array([1, 0])).values is None
    assert not (tmp_path / "s" / "values").exists()


def test_no_rollouts_at_all(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "s", [])
    assert (cache.num_rollouts, cache.num_tokens, cache.max_length, cache.max_token_id) == (0, 0, 0, -1)


def test_an_extra_column_is_written_in_any_order(cache: RolloutCache, rollouts: Rollouts) -> None:
    column = np.random.default_rng(1).normal(size=len(rollouts.input_ids)).astype(np.float32)
    whole = replace(rollouts, values=column)
    with cache.new_column("epoch") as writer:
        for piece in np.array_split(np.random.default_rng(2).permutation(len(rollouts)), 5):
            writer.write(piece, whole.take(piece).values)
        assert not cache.has_column("epoch")
    assert cache.has_column("epoch")
    index = np.array([7, 1, 2, 3, 0])
    assert_same(cache.read(index, values_from="epoch"), whole.take(index))
    assert_same(cache.read(index), rollouts.take(index))
    cache.drop_column("epoch")
    cache.drop_column("epoch")
    assert not cache.has_column("epoch")


def test_a_second_writing_replaces_the_first_whole(cache: RolloutCache, rollouts: Rollouts) -> None:
    index = np.arange(len(rollouts))
    for number in (1.0, 2.0):
        with cache.new_column("epoch") as writer:
            writer.write(index, np.full(len(rollouts.input_ids), number, dtype=np.float32))
    assert set(cache.read(index, values_from="epoch").values.tolist()) == {2.0}


def test_an_aborted_writer_leaves_nothing(cache: RolloutCache) -> None:
    before = sorted(path.name for path in cache.directory.iterdir())
    writer = cache.new_column("epoch")
    writer.__enter__()
    writer.write(np.array([0]), np.zeros(int(cache.lengths[0]), dtype=np.float32))
    writer.__exit__(RuntimeError, RuntimeError(), None)
    assert sorted(path.name for path in cache.directory.iterdir()) == before


def test_a_column_of_the_wrong_length_is_refused(cache: RolloutCache) -> None:
    tokens = int(cache.lengths[0])
    for wrong in (tokens - 1, tokens + 1):
        with pytest.raises(ValueError, match="tokens"), cache.new_column("epoch") as writer:
            writer.write(np.array([0]), np.zeros(wrong, dtype=np.float32))
    assert not cache.has_column("epoch")


def test_a_failing_stream_leaves_no_directory(tmp_path: Path, rollouts: Rollouts) -> None:
    def failing() -> Iterator[Rollouts]:
        yield rollouts
        assert not (tmp_path / "s").exists()
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_cache(tmp_path / "s", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_failing_stream_leaves_the_old_spool(cache: RolloutCache, rollouts: Rollouts) -> None:
    def failing() -> Iterator[Rollouts]:
        yield rollouts.take(np.array([0]))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_cache(cache.directory, failing())
    assert_same(RolloutCache.open(cache.directory).read(np.arange(len(rollouts))), rollouts)
    assert [path.name for path in cache.directory.parent.iterdir()] == [cache.directory.name]


@pytest.mark.parametrize("name", ["input_ids", "response_mask", "returns", "values", "groups.npy", "meta.json"])
@pytest.mark.parametrize("harm", ["gone", "cut", "emptied", "longer"])
def test_a_damaged_spool_is_refused(cache: RolloutCache, name: str, harm: str) -> None:
    file = cache.directory / name
    content = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-1], "emptied": b"", "longer": content + b"x"}[harm])
    if (name, harm) == ("groups.npy", "longer"):
        return  # numpy reads what it knows of; nothing is lost
    with pytest.raises(CacheDamaged):
        RolloutCache.open(cache.directory)


def test_an_index_of_the_wrong_size_is_refused(cache: RolloutCache) -> None:
    for name in ("groups", "rows", "response_counts", "return_sums", "offsets"):
        file = cache.directory / f"{name}.npy"
        content = file.read_bytes()
        np.save(file, np.load(file)[:-1])
        with pytest.raises(CacheDamaged):
            RolloutCache.open(cache.directory)
        file.write_bytes(content)
    RolloutCache.open(cache.directory)


def test_another_version_and_no_spool_are_refused(cache: RolloutCache, tmp_path: Path) -> None:
    with pytest.raises(CacheDamaged):
        RolloutCache.open(tmp_path / "nowhere")
    meta = json.loads((cache.directory / "meta.json").read_text())
    (cache.directory / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(CacheDamaged, match="99"):
        RolloutCache.open(cache.directory)


def test_a_file_cut_while_the_spool_is_open_is_noticed(cache: RolloutCache) -> None:
    file = cache.directory / "returns"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CacheDamaged, match="ended early"):
        cache.read(np.arange(cache.num_rollouts))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_any_operation_is_an_os_error_and_leaves_nothing(number, tmp_path):
    operations = []
    with watched(operations.append):
        write_cache(tmp_path / "whole", [branching_rollouts()])
    for at in range(1, len(operations)):
        folder = tmp_path / str(at)
        folder.mkdir()
        with watched(Fails(at=at, number=number)):
            try:
                write_cache(folder / "spool", [branching_rollouts()])
            except OSError as error:
                assert error.errno == number  # noqa: PT017
                assert not list(folder.glob(".*"))
