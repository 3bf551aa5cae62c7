"""NeMo-RL's trajectory values: targets stand where the policy begins to write."""

from conftest import ids_of, write_lines

END = 2


def message(role, text):
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


ITEMS = [message("user", "say p"), message("assistant", "p is said"), message("user", "say q")]
TEMPLATED = "user : say p assistant : p is said </s> 0 user : say q assistant :"


def test_one_target_at_the_end(tmp_path, converted, tokenizer):
    record = {
        "schema_version": "trajectory_value_v1", "instance_id": "task-1", "value_target": 0.75,
        "responses_create_params": {"input": ITEMS},
    }  # fmt: skip
    write_lines(tmp_path / "a.jsonl", [record])
    done = converted(tmp_path / "a.jsonl", tokenizer=str(tokenizer), allow_retokenize=True)
    (row,) = done.table.to_pylist()
    assert row["input_ids"] == [*ids_of(TEMPLATED), END]
    assert row["response_mask"] == [False] * len(ids_of(TEMPLATED)) + [True]
    assert row["returns"][-1] == 0.75
    assert row["uid"] == "task-1"
    assert [source["format"] for source in done.result["sources"]] == ["NeMo-RL trajectory values"]


def test_targets_in_several_states(tmp_path, converted, tokenizer):
    targets = [
        {"target_id": str(i), "value_target": value, "location": {"type": "post_item_state", "item_index": i}}
        for i, value in ((0, 0.5), (2, 0.25))
    ]
    record = {
        "schema_version": "trajectory_value_v2", "instance_id": "task-1", "trajectory_id": "t", "targets": targets,
        "responses_create_params": {"input": ITEMS},
    }  # fmt: skip
    odd = {**record, "targets": [{**targets[0], "location": {"type": "token", "item_index": 0}}]}
    write_lines(tmp_path / "a.jsonl", [record, odd, {**record, "trajectory_ref": {"path": "b.jsonl"}}])
    done = converted(tmp_path / "a.jsonl", tokenizer=str(tokenizer), allow_retokenize=True, on_bad_rows="skip")
    (row,) = done.table.to_pylist()
    opened = len(ids_of("user : say p assistant :"))
    assert row["input_ids"] == [*ids_of(TEMPLATED), END]
    assert {place: row["returns"][place] for place, one in enumerate(row["response_mask"]) if one} == {
        opened: 0.5,
        len(ids_of(TEMPLATED)): 0.25,
    }
    assert done.result["rows_left_out"]["count"] == 2
