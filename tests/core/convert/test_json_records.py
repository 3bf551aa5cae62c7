"""Records of text files, however they are cut: the same as Python's json makes of the whole."""

import gzip
import json

import pytest

from critic_train.convert import json_records
from critic_train.convert.json_records import compression_of, record_chunks
from critic_train.errors import DataError

RECORDS = [{"a": i, "b": "x" * i, "c": [{"d": "]}"}]} for i in range(40)]


def read(path):
    good, bad = [], []
    for records, odd, _ in record_chunks(path):
        good += records
        bad += odd
    return good, bad


@pytest.mark.parametrize("chunk", [7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("joined", [False, True])
def test_values_are_those_of_the_whole(tmp_path, monkeypatch, chunk, indent, joined):
    monkeypatch.setattr(json_records, "CHUNK_BYTES", chunk)
    texts = [json.dumps(record, indent=indent) for record in RECORDS]
    (tmp_path / "a.json").write_text(" \n".join(texts) if joined else f"\n[{','.join(texts)}]")
    good, bad = read(tmp_path / "a.json")
    assert [record for _, record in good] == RECORDS
    assert [row for row, _ in good] == list(range(40))
    assert not bad


def test_lines_are_numbered_with_empty_ones_and_odd_ones_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n[1]\n{"a": 2}\nnonsense\n')
    good, bad = read(tmp_path / "a.jsonl")
    assert good == [(1, {"a": 1}), (4, {"a": 2})]
    assert [(record.row, record.actual[:7]) for record in bad] == [(3, "a list"), (5, "no JSON")]


def test_an_array_that_ends_early_is_told(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a":')
    good, bad = read(tmp_path / "a.json")
    assert good == [(0, {"a": 1})]
    assert [record.row for record in bad] == [1]


def test_damaged_compression_is_told(tmp_path):
    packed = gzip.compress(b'{"a": 1}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: the file is damaged"):
        read(tmp_path / "a.jsonl.gz")
    assert compression_of(packed) == "gzip"
    assert compression_of(b'{"a": 1}') is None


def test_rows_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,response\n"say, p",p\nshort\n')
    good, bad = read(tmp_path / "a.csv")
    assert good == [(0, {"prompt": "say, p", "response": "p"})]
    assert [record.row for record in bad] == [1]
