"""Columns of records that differ from each other."""

from conftest import write_lines


def test_values_that_are_missing_in_one_line_make_a_bad_row(tmp_path, converted):
    good = {"input_ids": [1, 2, 3], "response_mask": [0, 1, 1], "returns": [0, 1, 1], "values": [0, 0.5, 0.5]}
    lines = [good, {**good, "values": None}, {**good, "input_ids": ["a", "b", "c"]}, {**good, "returns": [1.5]}]
    write_lines(tmp_path / "a.jsonl", lines)
    done = converted(tmp_path / "a.jsonl", on_bad_rows="skip")
    assert done.table.num_rows == 1
    assert done.result["rows_left_out"]["reasons"] == {"nulls": 2, "lengths that disagree": 1}


def test_numbers_keep_their_value_across_types(tmp_path, converted):
    lines = [{"tokens": [1, 2], "mask": [0, 1], "reward": r, "note": n} for r, n in ((1, "a"), (0.5, 2), (True, None))]
    write_lines(tmp_path / "a.jsonl", lines[:2])
    write_lines(tmp_path / "b.jsonl", lines[2:])
    done = converted(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert done.table.column("reward").to_pylist() == [1, 0.5, 1]
    assert done.table.column("note").to_pylist() == ["a", "2", None]
