"""Shards are found wherever they are, and all that is wrong with them is said at once."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from critic_train.convert.dump_files import SUFFIXES as DUMP_SUFFIXES
from critic_train.data.shards import DUMPS, SUFFIXES, find_shards, fingerprint
from critic_train.errors import DataError


def names(sources: list[str], base: Path) -> list[str]:
    return [os.path.relpath(shard.name, base) for shard in find_shards(sources)]


@pytest.fixture
def folder(shards: Any, good: dict[str, Any]) -> Path:
    for name in ("b/2.parquet", "b/1.parq", "a.parquet", "_old/3.parquet", ".hidden.parquet", "b/_4.parquet"):
        shards.write(good, name)
    (shards.folder / "README.md").write_text("about")
    return shards.folder


def test_folders_are_searched_to_any_depth_without_hidden_names(folder: Path) -> None:
    assert names([str(folder)], folder) == ["a.parquet", "b/1.parq", "b/2.parquet"]


def test_files_globs_and_folders_that_overlap_count_once(folder: Path) -> None:
    sources = [str(folder / "b"), str(folder / "a.parquet"), str(folder / "**" / "[ab2]*.parquet"), str(folder)]
    assert names(sources, folder) == ["a.parquet", "b/1.parq", "b/2.parquet"]


def test_a_glob_means_what_it_says(folder: Path) -> None:
    assert names([str(folder / "*" / "_4*")], folder) == ["b/_4.parquet"]
    assert names([str(folder / "*")], folder)[-1] == "b/2.parquet"  # the README beside them is passed over


def test_a_glob_of_folders_searches_them(folder: Path) -> None:
    assert names([str(folder / "[ab]*")], folder) == ["a.parquet", "b/1.parq", "b/2.parquet"]


def test_a_file_under_any_name_is_taken_when_named(folder: Path) -> None:
    shutil.copy(folder / "a.parquet", folder / "dump.bin")
    assert names([str(folder / "dump.bin")], folder) == ["dump.bin"]


def test_links_count_once(folder: Path) -> None:
    (folder / "c.parquet").symlink_to(folder / "a.parquet")
    (folder / "d").symlink_to(folder / "b")
    assert len(find_shards([str(folder)])) == 3


def test_a_shard_knows_its_size(shards: Any, good: dict[str, Any]) -> None:
    path = shards.write(good, row_group_size=2)
    (shard,) = find_shards([str(path)])
    assert (shard.num_rows, shard.num_row_groups, shard.size_bytes) == (3, 2, path.stat().st_size)


def test_all_that_cannot_be_read_is_named_at_once(folder: Path) -> None:
    whole = (folder / "a.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "text.parquet").write_text("no Parquet at all, but long enough to be one")
    (folder / "short.parquet").write_bytes(b"PAR1")
    (folder / "lying.parquet").write_bytes(whole[:-8] + (2**31).to_bytes(4, "little") + b"PAR1")
    (folder / "scrambled.parquet").write_bytes(whole[:-60] + bytes(52) + whole[-8:])
    (folder / "gone.parquet").symlink_to(folder / "nowhere")
    nothing = folder / "nothing"
    nothing.mkdir()
    with pytest.raises(DataError) as caught:
        find_shards([str(folder), str(folder / "missing"), str(folder / "*.orc"), str(nothing)])
    lines = dict(line.strip().split(": ", 1) for line in caught.value.message.splitlines()[1:])
    said = {os.path.relpath(name, folder): why for name, why in lines.items()}
    assert said.pop("scrambled.parquet")
    assert said.pop("gone.parquet") == "No such file or directory"
    assert said == {
        "cut.parquet": f"the Parquet file is truncated ({len(whole) // 2:,} bytes and no footer)",
        "empty.parquet": "the file is empty (0 bytes)",
        "text.parquet": "this is no Parquet file",
        "short.parquet": said["short.parquet"],
        "lying.parquet": "the Parquet footer is damaged (it claims 2,147,483,648 bytes)",
        "missing": "there is no such file or folder",
        "*.orc": "no Parquet file matches",
        "nothing": "the folder holds no .parquet file",
    }


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "rollout_5.pt", "batch.pkl", "train.json", "data-00000-of-00001.arrow", "a.jsonl.gz", "b.json.zst"],
)
def test_a_dump_names_the_command_that_converts_it(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "my dumps"
    folder.mkdir()
    (folder / name).write_bytes(b"{}")
    for source in (folder, folder / name, tmp_path / "my*" / "*"):
        with pytest.raises(DataError, match="no Parquet, but files that critic-train convert reads") as caught:
            find_shards([str(source)])
        named = str(source) if "*" in str(source) else f"'{source}'"
        assert caught.value.hint == f"critic-train convert {named} --to shards/ makes shards of them; read shards/ then"


def test_a_model_is_no_dump(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"the folder holds no \.parquet file"):
        find_shards([str(tmp_path)])


def test_the_id_of_a_data_set_on_the_hub_is_told_from_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"hf://datasets/open-r1/OpenR1-Math reads its .* hf download open-r1/OpenR1-Math"
    ):
        find_shards(["open-r1/OpenR1-Math"])
    (tmp_path / "runs").mkdir()
    for path in ("runs/rollouts", "x/a.parquet", "deep/er/path"):
        with pytest.raises(DataError) as caught:
            find_shards([path])
        assert "hub" not in caught.value.message


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find_shards([str(tmp_path / "pipe")])


def test_long_lists_of_faults_are_cut_and_counted(tmp_path: Path) -> None:
    for i in range(25):
        (tmp_path / f"{i:02}.parquet").touch()
    with pytest.raises(DataError, match="and 5 more"):
        find_shards([str(tmp_path)])


def test_the_fingerprint_moves_with_the_folder(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(find_shards([str(folder)]))
    shutil.move(folder, tmp_path / "elsewhere")
    assert fingerprint(find_shards([str(tmp_path / "elsewhere")])) == before
    assert [f["name"] for f in before["files"]] == ["a.parquet", "b/1.parq", "b/2.parquet"]


def test_the_fingerprint_changes_with_names_and_numbers(shards: Any, good: dict[str, Any]) -> None:
    plain = {"compression": "none", "use_dictionary": False}
    shards.write(good, **plain)
    before = fingerprint(find_shards([str(shards.folder)]))
    (shards.folder / "a.parquet").rename(shards.folder / "b.parquet")
    assert fingerprint(find_shards([str(shards.folder)]))["digest"] != before["digest"]
    (shards.folder / "b.parquet").unlink()
    good["returns"][0][3] = 1.5  # neither the least nor the greatest: the footer stays the same
    shards.write(good, **plain)
    after = fingerprint(find_shards([str(shards.folder)]))
    assert after["files"][0]["footer"] == before["files"][0]["footer"]
    assert after["digest"] != before["digest"]


def test_every_file_that_convert_reads_counts_as_a_dump() -> None:
    for suffix in set(DUMP_SUFFIXES) - set(SUFFIXES):
        assert DUMPS.fullmatch(f"a{suffix}"), suffix
