"""JSON objects of files that others may have written."""

import json

import pytest

from critic_train import jsonio
from critic_train.jsonio import parse_json_object, read_json_object, read_json_object_or_none


def test_an_object_is_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"é": [1, 2.5, None]}), encoding="utf-8")
    assert read_json_object(file) == read_json_object_or_none(file) == {"é": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe\xfd", "utf"),
        (b"[1]", "it holds no JSON object"),
        (b"null", "it holds no JSON object"),
        (b'{"a":' * 200_000, "it is nested too deeply"),
        (b'{"a": "' + bytes(100) + b'"}', "it has more than 64 bytes"),
    ],
    ids=["empty", "half", "no text", "list", "null", "deep", "long"],
)
def test_anything_else_is_refused_with_what_is_there(content, complaint, tmp_path, monkeypatch):
    if "64 bytes" in complaint:
        monkeypatch.setattr(jsonio, "MOST_BYTES", 64)
    file = tmp_path / "a.json"
    file.write_bytes(content)
    for read in (lambda: parse_json_object(content), lambda: read_json_object(file)):
        with pytest.raises(ValueError, match=complaint):
            read()
    assert read_json_object_or_none(file) is None


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "a.json")
    assert read_json_object_or_none(tmp_path / "a.json") is None
