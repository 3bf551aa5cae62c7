"""Step labels: each is the return of the state behind its step, read off the step's last token."""

import pytest
from conftest import WORDS, ids_of, write_lines

STEPS = ["p is said", "q is said", "q"]
END = 2


def prm800k(prompt, steps, labels):
    shown = [
        {"completions": [{"text": "times", "rating": -1}, {"text": text, "rating": label}], "chosen_completion": 1}
        for text, label in zip(steps, labels, strict=True)
    ]
    return {"question": {"problem": prompt}, "label": {"steps": shown}}


def trl(prompt, steps, labels):
    return {"prompt": prompt, "completions": steps, "labels": [bool(label) for label in labels]}


def shepherd(prompt, steps, labels):
    texts = [f"{' ' if i else ''}Step {i + 1}: {text} " for i, text in enumerate(steps)]
    marks = ["+" if label else "-" for label in labels]
    written, marked = (
        prompt + " " + "\n".join(text + end for text, end in zip(texts, ends, strict=True))
        for ends in (["ки"] * len(steps), marks)
    )
    return {"input": written, "label": marked, "task": "GSM8K"}


@pytest.mark.parametrize("made", [prm800k, trl])
def test_labels_pair_with_the_token_behind_their_step(tmp_path, converted, tokenizer, made):
    write_lines(tmp_path / "a.jsonl", [made("say p", STEPS, [1, 0, 1])])
    done = converted(tmp_path / "a.jsonl", tokenizer=str(tokenizer), allow_retokenize=True)
    (row,) = done.table.to_pylist()
    assert row["input_ids"] == [1, *ids_of("say p"), *ids_of(" ".join(STEPS)), END]
    # <s> say p | p is said | q is said | q | </s>
    assert row["response_mask"] == [place in (6, 9, 10) for place in range(11)]
    assert row["returns"] == [{6: 1, 9: 0, 10: 1}.get(place, 0) for place in range(11)]
    assert "labels are the returns at the ends of steps" in done.said
    assert "--returns column" in done.result["next"]


def test_math_shepherd(tmp_path, converted, tokenizer):
    write_lines(tmp_path / "a.jsonl", [shepherd("say p", ["p is said", "q"], [1, 0])])
    done = converted(tmp_path / "a.jsonl", tokenizer=str(tokenizer), allow_retokenize=True)
    (row,) = done.table.to_pylist()
    # "Step" and "1:" are unknown words of the small vocabulary.
    unknown = WORDS.index("<unk>")
    step = [unknown, unknown, *ids_of("p is said")]
    assert row["input_ids"] == [1, *ids_of("say p"), *step, unknown, unknown, *ids_of("q"), END]
    assert [place for place, one in enumerate(row["response_mask"]) if one] == [8, 11]
    assert row["returns"][8] == 1
    assert row["returns"][11] == 0


def test_rollouts_of_one_question_are_a_group_and_odd_records_are_bad(tmp_path, converted, tokenizer):
    records = [trl("say p", STEPS, [1, 0, 1]), trl("say p", STEPS[1:], [1, 1]), trl("say q", STEPS, [1])]
    write_lines(tmp_path / "a.jsonl", [*records, {"prompt": "say q", "completions": ["q"], "labels": [None]}])
    done = converted(tmp_path / "a.jsonl", tokenizer=str(tokenizer), allow_retokenize=True, on_bad_rows="skip")
    uids = done.table.column("uid").to_pylist()
    assert len(uids) == 2
    assert uids[0] == uids[1]
    assert done.result["rows_left_out"]["count"] == 2
