"""Keys of prompt groups agree over files, and labels keep one type throughout."""

import datetime
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

DAY = datetime.date(2026, 1, 2)
UIDS = {
    "text": pa.array(["x", "y", "x"]),
    "large text": pa.array(["x", "y", "x"], pa.large_string()),
    "text view": pa.array(["x", "y", "x"], pa.string_view()),
    "dictionary": pa.array(["x", "y", "x"]).dictionary_encode(),
    "int": pa.array([1, 2, 1]),
    "uint8": pa.array([1, 2, 1], pa.uint8()),
    "float": pa.array([0.5, 1.5, 0.5]),
    "float16": pa.array(np.array([0.5, 1.5, 0.5], dtype=np.float16)),
    "bool": pa.array([True, False, True]),
    "binary": pa.array([b"\xff", b"y", b"\xff"]),
    "fixed binary": pa.array([b"\xff\x00", b"yy", b"\xff\x00"], pa.binary(2)),
    "date": pa.array([DAY, datetime.date(2026, 1, 3), DAY]),
    "nanoseconds": pa.array([1, 2, 1], pa.timestamp("ns")),
    "decimal": pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.50"), decimal.Decimal("1.50")]),
}


@pytest.mark.parametrize("kind", UIDS)
def test_a_uid_of_any_type(shards: Any, good: dict[str, Any], kind: str) -> None:
    keys = shards.read({**good, "uid": UIDS[kind]}).group
    assert keys[0] == keys[2] != keys[1]


def test_the_same_uid_in_files_of_other_types_is_the_same_group(shards: Any, good: dict[str, Any]) -> None:
    for name, uid in {
        "a": pa.array([1, 2, 3], pa.int32()),
        "b": pa.array(["3", "2", "1"]),
        "c": pa.array(["2", "3", "1"]).dictionary_encode(),
        "d": pa.array([3, 2, 1], pa.uint64()),
    }.items():
        shards.write({**good, "uid": uid}, f"{name}.parquet", row_group_size=2)
    a, b, c = shards.read(group_by="uid").group[:3].tolist()
    assert shards.read(group_by="uid").group.tolist() == [a, b, c, c, b, a, b, c, a, c, b, a]


def test_without_uid_equal_prompts_are_a_group(shards: Any, good: dict[str, Any]) -> None:
    shards.write(good, "a.parquet")
    shards.write({**good, "input_ids": [[5, 6, 7, 7], [9, 1, 1], [5, 7, 12, 13, 14]]}, "b.parquet")
    keys = shards.read().group.tolist()
    assert keys[0] == keys[2] == keys[3]  # the prompt is 5, 6
    assert keys[1] == keys[4]
    assert len(set(keys)) == 3


def test_a_rollout_without_uid_goes_by_its_prompt(shards: Any, good: dict[str, Any]) -> None:
    keys = shards.read({**good, "uid": [None, "y", None]}).group
    assert keys[0] == keys[2] != keys[1]
    everything = shards.read({**good, "uid": pa.nulls(3)}).group
    assert everything.tolist() == shards.read(good).group.tolist()


@pytest.mark.parametrize(
    ("column", "expected", "kind"),
    [
        (pa.array(["a", "b", "c"]), ["a", "b", "c"], "U"),
        (pa.array(["a", None, "c"]), ["a", "(none)", "c"], "U"),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"], "U"),
        (pa.array([1, 2, 3]), [1, 2, 3], "i"),
        (pa.array([1, None, 3]), ["1", "(none)", "3"], "U"),
        (pa.array([0.5, 1.5, 2.5]), [0.5, 1.5, 2.5], "f"),
        (pa.array([True, False, True]), [True, False, True], "b"),
        (pa.array([True, None, True]), ["True", "(none)", "True"], "U"),
        (pa.nulls(3), ["(none)"] * 3, "U"),
        (pa.array([DAY] * 3), ["2026-01-02"] * 3, "U"),
        (pa.array([0, 1, 2], pa.timestamp("ms")), [f"1970-01-01 00:00:00.00{i}" for i in range(3)], "U"),
        (pa.array([0, 1, None], pa.timestamp("ns", "UTC")), None, "U"),
        (pa.array([1, 2, 3], pa.duration("s")), None, "U"),
        (pa.array([decimal.Decimal("1.50")] * 3), ["1.50"] * 3, "U"),
        (pa.array([b"a", b"\xff", b"c"]), ["b'a'", "b'\\xff'", "b'c'"], "U"),
    ],
)
def test_labels_of_every_type(shards: Any, good: dict[str, Any], column: Any, expected: Any, kind: str) -> None:
    label = shards.read({**good, "by": column}, labels=["by"]).labels["by"]
    assert label.dtype.kind == kind
    assert expected is None or label.tolist() == expected


def test_a_label_keeps_one_type_in_all_batches(shards: Any, good: dict[str, Any]) -> None:
    shards.write({**good, "by": [1, 2, 3]}, "a.parquet")
    shards.write({**good, "by": [1, None, 3]}, "b.parquet")
    batches = list(shards.reader(labels=["by"]))
    assert [b.labels["by"].tolist() for b in batches] == [["1", "2", "3"], ["1", "(none)", "3"]]
    shards.write({**good, "by": ["1", "2", "3"]}, "b.parquet")
    assert [b.labels["by"].tolist() for b in shards.reader(labels=["by"])] == [["1", "2", "3"]] * 2


def test_labels_follow_the_rows_that_are_kept(shards: Any, good: dict[str, Any]) -> None:
    good["returns"][1][1] = float("nan")
    found = shards.read({**good, "by": ["a", "b", "c"], "n": [1, 2, 3]}, labels=["by", "n"], on_bad_rows="skip")
    assert found.labels["by"].tolist() == ["a", "c"]
    assert found.labels["n"].tolist() == [1, 3]
