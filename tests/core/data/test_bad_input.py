"""Files that cannot be used are all named at once, or left out whole and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from critic_train.data import decoding
from critic_train.data.bad_input import BadFiles
from critic_train.data.reading import RolloutReader
from critic_train.data.shards import find_shards
from critic_train.errors import DataError
from critic_train.stopping import Stopped, StopRequest

ROWS = {"cut": None, "empty": None, "text": None, "flipped": 90, "header": 90, "schema": 3, "good1": 3, "good2": 3}
"""What the footer of each file of `folder` tells of."""


def many(rows: int) -> pa.Table:
    """Rollouts in plain pages, several to a column."""
    ids = [[i % 90 + 1, i % 7 + 1, i % 50 + 1] for i in range(rows)]
    mask, numbers = [[0, 1, 1]] * rows, [[0.0, float(i), 1.0] for i in range(rows)]
    return pa.table({"input_ids": ids, "response_mask": mask, "returns": numbers, "values": numbers})


@pytest.fixture
def folder(shards: Any, good: dict[str, Any]) -> Path:
    """Two sound shards and one of each kind of bad one."""
    for name in ("good1", "good2"):
        shards.write(good, f"{name}.parquet")
    whole = (shards.folder / "good1.parquet").read_bytes()
    (shards.folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (shards.folder / "empty.parquet").write_bytes(b"")
    (shards.folder / "text.parquet").write_text("step,loss\n1,0.5\n")
    shards.write({"question": ["why"] * 3}, "schema.parquet")
    shards.write({name: [] for name in good}, "norows.parquet")
    plain = {"compression": "none", "use_dictionary": False, "row_group_size": 30}
    flip(shards.write(many(90), "flipped.parquet", write_page_checksum=True, **plain), 0.5)
    header = shards.write(many(90), "header.parquet", **plain)
    at = pq.read_metadata(header).row_group(2).column(0).data_page_offset
    content = bytearray(header.read_bytes())
    content[at : at + 12] = b"\xff" * 12
    header.write_bytes(content)
    return Path(shards.folder)


def flip(path: Path, place: float) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x10
    path.write_bytes(content)


def reader(folder: Path, **options: Any) -> RolloutReader:
    bad = BadFiles()
    return RolloutReader(find_shards([str(folder)], bad), bad_files=bad, **options)


def test_every_bad_file_is_named_at_once(folder: Path) -> None:
    rollouts = reader(folder)
    with pytest.raises(DataError) as caught:
        list(rollouts)
    assert caught.value.message.startswith("6 files cannot be used\n")
    lines = dict(line.strip().split(": ", 1) for line in caught.value.message.splitlines()[1:])
    said = {Path(name).stem: fault for name, fault in lines.items()}
    assert set(said) == {"cut", "empty", "text", "schema", "flipped", "header"}
    assert "truncated" in said["cut"]
    assert said["empty"] == "the file is empty (0 bytes)"
    assert said["text"] == "this is no Parquet file"
    assert said["schema"].startswith("lacks input_ids: ")
    assert said["schema"].endswith(". It has question: string")
    assert said["flipped"].startswith("is damaged: ")
    assert said["header"].startswith("is damaged: ")
    assert "--on-bad-file skip" in caught.value.hint
    assert any("norows.parquet holds no rows" in notice for notice in rollouts.notices)


def test_skipped_files_are_left_out_whole_and_counted(folder: Path) -> None:
    rollouts = reader(folder, on_bad_file="skip")
    assert [len(batch) for batch in rollouts] == [3, 3]
    assert [batch.row.tolist() for batch in rollouts] == [[0, 1, 2], [3, 4, 5]]
    summary = rollouts.bad_files.summary()
    assert (summary["count"], summary["rows"]) == (6, 183)
    assert {Path(file["file"]).stem: file["rows"] for file in summary["files"]} == {
        name: rows for name, rows in ROWS.items() if not name.startswith("good")
    }
    assert json.loads(json.dumps(summary)) == summary
    assert rollouts.bad_files.sentence().startswith("6 files are left out, with the 183 rows their footers tell of:\n")


@pytest.mark.parametrize("how", ["fail", "skip"])
def test_nothing_but_bad_files_is_an_error(folder: Path, how: str) -> None:
    for name in ("good1", "good2", "norows"):
        (folder / f"{name}.parquet").unlink()
    with pytest.raises(DataError, match="6 files cannot be used, and there are no others") as caught:
        list(reader(folder, on_bad_file=how))
    assert "skip" not in caught.value.hint


@pytest.mark.parametrize("how", ["fail", "skip"])
def test_nothing_but_unreadable_footers_is_an_error(folder: Path, how: str) -> None:
    for name in ("good1", "good2", "schema", "flipped", "header"):
        (folder / f"{name}.parquet").unlink()
    with pytest.raises(DataError, match="3 files cannot be used, and there are no others"):
        list(reader(folder, on_bad_file=how))


def test_bad_rows_and_bad_files_are_told_together(shards: Any, good: dict[str, Any]) -> None:
    shards.write({"question": ["why"]}, "b.parquet")
    good["returns"][0][3] = float("nan")
    shards.write(good)
    with pytest.raises(DataError) as caught:
        list(shards.reader())
    assert "b.parquet lacks" in caught.value.message
    assert "1 row cannot be used" in caught.value.message
    assert len(list(shards.reader(on_bad_file="skip", on_bad_rows="skip"))) == 1
    with pytest.raises(DataError, match=r"^1 row cannot be used"):
        list(shards.reader(on_bad_file="skip"))


def test_files_with_the_same_fault_share_a_line_and_long_lists_are_cut(tmp_path: Path) -> None:
    for i in range(70):
        (tmp_path / f"{i:02}.parquet").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        find_shards([str(tmp_path)], BadFiles())
    lines = caught.value.message.splitlines()
    assert (lines[0], lines[-1]) == ("70 files cannot be used, and there are no others", "  and 4 more")
    assert lines[1].count(".parquet") == 3


def test_a_typing_error_is_no_bad_file(folder: Path) -> None:
    with pytest.raises(DataError, match="no canonical column 'return_'"):
        list(reader(folder, on_bad_file="skip", renames={"return_": "returns"}))
    with pytest.raises(DataError, match="there is no such file or folder"):
        find_shards([str(folder), str(folder / "missing")], BadFiles())


def test_fewer_rows_than_the_footer_says_are_no_whole_file(
    shards: Any, good: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.write(good)
    after: Callable[..., Any] = decoding._after
    monkeypatch.setattr(decoding, "_after", lambda *how: (batch.slice(0, 2) for batch in after(*how)))
    with pytest.raises(DataError, match="row group 0 holds 2 rows, its footer says 3"):
        list(shards.reader())


def test_a_stop_is_heard_while_files_are_tried(shards: Any, good: dict[str, Any]) -> None:
    shards.write(good)
    stop = StopRequest(signal_number=15)
    with pytest.raises(Stopped):
        list(shards.reader(on_bad_file="skip", stop=stop))
