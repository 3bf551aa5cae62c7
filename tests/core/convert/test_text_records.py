"""Text of every kind, tokenized again."""

import contextlib
import json
from pathlib import Path

import dumps
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import write_fixtures
from conftest import FIXTURES, fits, fresh, ids_of, run, write_lines

from critic_train.errors import ConfigError, ModelError
from critic_train.settings import ConvertSettings


def text_of(place: int) -> tuple[str, str, float]:
    uid = "pqqppqpq"[place]
    return f"say {uid}", f"{uid} is said , {place} times", dumps.rollouts()[place].reward


@pytest.mark.parametrize("name", ["verl", "verl, fresh", "trl", "prompt and response"])
def test_text_is_tokenised_anew_and_that_is_said(tmp_path, converted, tokenizer, name):
    if name == "verl":
        source = FIXTURES / "verl_rollout_data_dir"
    elif name == "verl, fresh":
        source = fresh("verl.trainer.ppo.ray_trainer", write_fixtures.verl_lines, "rollouts")(tmp_path)
    elif name == "trl":
        source = tmp_path / "completions" / "completions_00007.parquet"
        trl_table(source)
    else:
        source = tmp_path / "a.jsonl"
        write_lines(source, [dict(zip(("prompt", "response", "score"), text_of(i), strict=True)) for i in range(8)])
    done = converted(source, tokenizer=str(tokenizer), allow_retokenize=True)
    found = done.table
    for place in range(8):
        prompt, response, reward = text_of(place)
        left, right = [1, *ids_of(prompt)], ids_of(response)
        assert found.column("input_ids")[place].as_py() == left + right
        assert found.column("response_mask")[place].as_py() == [False] * len(left) + [True] * len(right)
        assert found.column("reward")[place].as_py() == pytest.approx(reward)
    assert done.result["retokenized"] == {"rollouts": 8, "tokens": 8 * 9}
    assert "token boundaries may differ from the policy's" in done.said
    if name.startswith("verl"):
        assert found.column("step").to_pylist() == [7] * 8
        assert "uid" not in found.column_names
        assert found.column("request").to_pylist() == [f"id-{place}" for place in range(8)]
    assert fits(done.to, tmp_path / "run", "mc", has_values=False)


def trl_table(path: Path, *, chat: bool = False, rewards: int = 1) -> None:
    """The table of GRPOTrainer.log, as to_parquet writes it."""
    texts = [text_of(place) for place in range(8)]
    path.parent.mkdir(exist_ok=True)
    columns = {
        "step": [7] * 8,
        "prompt": [[{"role": "user", "content": t[0]}] if chat else t[0] for t in texts],
        "completion": [[{"role": "assistant", "content": t[1]}] if chat else t[1] for t in texts],
        **{f"reward_{i}": [t[2] + i for t in texts] for i in range(rewards)},
        "advantage": [0.5] * 8,
    }
    pq.write_table(pa.table(columns), path)


def test_trl_sums_its_reward_functions_and_takes_chat(tmp_path, converted, tokenizer):
    trl_table(tmp_path / "a.parquet", chat=True, rewards=2)
    done = converted(tmp_path / "a.parquet", tokenizer=str(tokenizer), allow_retokenize=True)
    prompt, response, reward = text_of(3)
    expected = ids_of(f"user : {prompt} assistant :"), ids_of(f"{response} </s>")
    assert done.table.column("input_ids")[3].as_py() == expected[0] + expected[1]
    assert done.table.column("response_mask")[3].as_py() == [False] * len(expected[0]) + [True] * len(expected[1])
    assert done.table.column("reward")[3].as_py() == 2 * reward + 1
    assert "reward = `reward_0` + `reward_1`, the sum" in done.said
    assert done.table.column("reward_1")[3].as_py() == reward + 1


def test_a_chat_of_two_turns_is_masked_where_the_assistant_wrote(tmp_path, converted, tokenizer):
    talk = [("user", "say p"), ("assistant", "p is said"), ("user", "say q"), ("assistant", "q")]
    lines = [
        {
            "messages": [{"role": role, "content": words} for role, words in talk],
            "score": 1,
            "uid": "a",
            "task": "talk",
        },
        {"messages": [{"from": role.replace("user", "human"), "value": words} for role, words in talk], "reward": [2]},
        {"messages": [{"role": "user", "content": "say p"}], "score": 1},
        {"messages": "say p", "score": 1},
        {"messages": talk, "score": None},
    ]
    write_lines(tmp_path / "a.jsonl", lines)
    done = converted(tmp_path / "a.jsonl", tokenizer=str(tokenizer), allow_retokenize=True, on_bad_rows="skip")
    parts = [("user : say p assistant :", 0), ("p is said </s>", 1), ("0 user : say q assistant :", 0), ("q </s>", 1)]
    ids = [i for words, _ in parts for i in ids_of(words)]
    mask = [bool(said) for words, said in parts for _ in words.split()]
    assert done.table.column("input_ids").to_pylist() == [ids, ids]
    assert done.table.column("response_mask").to_pylist() == [mask, mask]
    assert done.table.column("reward").to_pylist() == [1, 2]
    assert done.table.column("uid").to_pylist() == ["a", None]
    assert done.result["rows_left_out"]["count"] == 3
    assert "record 2, column messages: found no conversation" in done.result["rows_left_out"]["first"][0]


def test_text_needs_a_tokenizer_and_leave(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"prompt": "say p", "response": "p", "score": 1}\n')
    with pytest.raises(ConfigError, match="holds no token ids"):
        run(tmp_path / "shards", tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="holds no token ids"):
        run(tmp_path / "shards", tmp_path / "a.jsonl", tokenizer=str(tokenizer))
    with pytest.raises(ConfigError, match="--allow-retokenize needs --tokenizer"):
        ConvertSettings(source=["x"], to="y", allow_retokenize=True)
    with pytest.raises(ModelError, match="no such folder"):
        run(tmp_path / "shards", tmp_path / "a.jsonl", tokenizer=str(tmp_path / "none"), allow_retokenize=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        run(tmp_path / "shards", tmp_path / "a.jsonl", tokenizer=str(tmp_path / "empty"), allow_retokenize=True)


def test_a_tokenizer_that_asks_for_code_does_not_run_it(tmp_path, tokenizer):
    import shutil

    evil = tmp_path / "evil"
    shutil.copytree(tokenizer, evil)
    (evil / "tokenizer.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass T: pass\n")
    config = json.loads((evil / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tokenizer.T", None]}, "tokenizer_class": "T"}
    (evil / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a.jsonl").write_text('{"prompt": "say p", "response": "p", "score": 1}\n')
    with contextlib.suppress(ModelError):
        run(tmp_path / "shards", tmp_path / "a.jsonl", tokenizer=str(evil), allow_retokenize=True)
    assert not (tmp_path / "it ran").exists()
