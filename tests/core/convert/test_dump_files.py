"""Files that are found, and lines that are none."""

import pytest
from conftest import lines, run

from critic_train.convert.dump_files import find_sources
from critic_train.errors import DataError


def test_sources_are_found_in_order_each_once_and_all_that_is_missing_is_listed(tmp_path):
    for name in ("b/step_10.jsonl", "b/step_9.jsonl", "b/.hidden.pt", "b/_x.pt", "b/notes.txt", "odd.name"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_sources([f"{tmp_path}/b", f"{tmp_path}/b/*", f"{tmp_path}/odd.name"])
    assert [source.path.name for source in found] == ["step_9.jsonl", "step_10.jsonl", "odd.name"]
    with pytest.raises(DataError, match="some sources cannot be found") as caught:
        find_sources([f"{tmp_path}/none", f"{tmp_path}/*.zip"])
    assert f"{tmp_path}/none: there is no such file" in caught.value.message
    assert "*.zip: no file matches" in caught.value.message


def test_lines_that_are_no_records_are_bad_rows(tmp_path):
    path = lines(tmp_path / "a.jsonl", 3)
    good = path.read_bytes()
    path.write_bytes(good + b"\n{broken\n[1]\n" + b"[" * 100_000 + b"\n\xff\xfe{}\n" + good)
    with pytest.raises(DataError, match="4 rows cannot be used") as caught:
        run(tmp_path / "shards", path)
    assert "record 4: found no JSON" in caught.value.message
    assert "record 5: found a list, expected one JSON object a line" in caught.value.message
    assert run(tmp_path / "skipping", path, on_bad_rows="skip").result["rollouts"] == 6
