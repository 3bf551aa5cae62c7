"""Every format, from a file as its framework writes it to shards, field by field, and a critic trained on them."""

import importlib
import json
from pathlib import Path
from typing import get_args

import dumps
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import write_fixtures
from conftest import ids_of

from critic_train.converting.formats import FORMAT_NAMES, TITLES
from critic_train.events import RunEnded
from critic_train.settings import DumpFormat, FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

FIXTURES = Path(__file__).parent / "fixtures"


def fixture(name: str):
    return lambda path: FIXTURES / name


def fresh(package: str, write, name: str):
    """The same by the framework's own code, now, where it is installed with what it needs."""

    def made(path: Path) -> Path:
        try:
            importlib.import_module(package)
        except ImportError as error:
            pytest.skip(f"{package} is not here whole: {error}")
        write(path / name)
        return path / name

    return made


def built(write, name: str):
    def made(path: Path) -> Path:
        write(dumps.rollouts(), path / name)
        return path / name

    return made


VERL = {"uid": "uid", "task": "task", "acc": "reward"}
ALL = ("values", "returns", "rewards")
SOURCES = {
    "slime train": (
        built(dumps.slime_train, "train_7.pt"), "slime train data", ("values", "returns"),
        {"reward": "reward", "raw_reward": "reward", "truncated": "truncated"},
    ),
    "slime rollout": (
        built(dumps.slime_rollout, "rollout_7.pt"), "slime rollout data", (),
        {"reward": "reward", "truncated": "truncated", "label": "task"},
    ),
    "verl": (fixture("verl_dataproto.pkl"), "verl DataProto", ALL, VERL),
    "verl, numpy": (fixture("verl_dataproto_numpy.pkl"), "verl DataProto", ALL, VERL),
    "verl, jagged": (fixture("verl_dataproto_jagged.pkl"), "verl DataProto", ("values", "returns"), VERL),
    "verl, fresh": (fresh("verl", write_fixtures.verl_data_proto, "a.pkl"), "verl DataProto", ALL, VERL),
    "verl, jagged, fresh": (
        fresh("verl", write_fixtures.verl_jagged, "a.pkl"), "verl DataProto", ("values", "returns"), VERL,
    ),
    "nemo-rl": (
        built(dumps.nemo_rl, "train_data_step7.jsonl"), "NeMo-RL train data", (), {"reward": "reward", "task": "task"},
    ),
    "openrlhf": (
        fixture("openrlhf_experiences.pt"), "OpenRLHF Experience", ("values", "returns"),
        {"reward": "reward", "truncated": "truncated", "label": "task"},
    ),
    "openrlhf, fresh": (
        fresh("openrlhf.trainer.ppo_utils.experience", write_fixtures.openrlhf_experiences, "a.pt"),
        "OpenRLHF Experience", ("values", "returns"), {"reward": "reward", "truncated": "truncated"},
    ),
    "tokens": (
        built(dumps.tokens_elsewhere, "a.parquet"), "token ids", ("values", "returns"), {"uid": "uid", "task": "task"},
    ),
    "token lines": (
        built(dumps.token_lines, "a.jsonl"), "token ids", ("rewards",), {"uid": "uid", "truncated": "truncated"},
    ),
}  # fmt: skip
RENAMES = ["input_ids=my_tokens", "response_mask=policy_mask", "values=v", "returns=target", "uid=grp"]
STEPS = {"slime train", "slime rollout", "verl", "verl, numpy", "verl, fresh", "nemo-rl", "openrlhf", "openrlhf, fresh"}
"""Sources that say the step."""


@pytest.mark.parametrize("name", SOURCES)
def test_field_by_field_and_fit_runs(tmp_path, converted, name):
    source, format_, token_columns, single = SOURCES[name]
    done = converted(source(tmp_path), column=RENAMES if name == "tokens" else [])
    assert [entry["format"] for entry in done.result["sources"]] == [format_]
    table = done.table
    found = {column: table.column(column).to_pylist() for column in table.column_names}
    # Prompt groups were put together, in the order of their first rollout; files read as a stream keep their order.
    streamed = name in ("nemo-rl", "tokens", "token lines")
    expected = dumps.rollouts() if streamed else sorted(dumps.rollouts(), key=lambda r: "pq".index(r.uid))
    assert found["input_ids"] == [r.ids for r in expected]
    assert found["response_mask"] == [r.mask for r in expected]
    for column in token_columns:
        assert found[column] == [getattr(r, column) for r in expected], column
    for column, field in single.items():
        assert found[column] == [getattr(r, field) for r in expected], column
    assert found.get("step") == ([dumps.STEP] * 8 if name in STEPS else None)
    has_returns = "returns" in token_columns
    assert ("--returns column" if has_returns else "--returns mc") in done.result["next"]
    assert ("there are no returns" in done.said) == (not has_returns)
    assert done.result["tokens"] == sum(len(r.ids) for r in expected)
    assert done.result["response_tokens"] == sum(sum(r.mask) for r in expected)
    assert fits(done.to, tmp_path / "run", "column" if has_returns else "mc", "values" in token_columns)


def test_a_format_that_is_declared_can_be_chosen_and_is_in_the_docs():
    """The settings may not import the formats: the names are written once more there."""
    assert get_args(DumpFormat) == FORMAT_NAMES
    page = (Path(__file__).parents[3] / "docs" / "convert.md").read_text()
    assert all(f"| `{name}` |" in page for name in FORMAT_NAMES)
    assert TITLES.startswith("slime .pt, verl DataProto or JSONL, NeMo-RL JSONL, ")


def fits(data: Path, out: Path, returns: str, has_values: bool) -> bool:
    """Two steps of training on shards."""
    settings = FitSettings(
        data=[str(data)],
        out=str(out),
        preset="tiny",
        max_steps=2,
        batch_size=4,
        val_fraction=0.0,
        returns=returns,
        old_values="column" if has_values else "none",
        device="cpu",
        no_report=True,
    )
    ended = [event for event in fit(settings, StopRequest()) if isinstance(event, RunEnded)]
    return ended[-1].status == "finished" and ended[-1].result["steps"] == 2


def test_slimes_own_fields(tmp_path, converted):
    dumps.slime_rollout(dumps.rollouts(), tmp_path / "a.pt")
    table = converted(tmp_path / "a.pt").table
    assert table.column("uid").to_pylist() == ["0"] * 4 + ["1"] * 4
    assert set(table.column("policy_version").to_pylist()) == {"4"}
    assert table.column("status").to_pylist().count("truncated") == 2
    assert {"prompt", "response", "metadata", "rollout_log_probs"}.isdisjoint(table.column_names)


def test_samples_that_slime_removed_and_rewards_under_names(tmp_path, converted):
    import torch

    dumps.slime_rollout(dumps.rollouts(), tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt")
    for place, sample in enumerate(content["samples"]):
        sample["reward"] = {"accuracy": float(place), "format": 0.5}
        sample["remove_sample"] = place < 2
    torch.save(content, tmp_path / "a.pt")
    done = converted(tmp_path / "a.pt", column=["reward=reward_accuracy"])
    assert sorted(done.table.column("reward").to_pylist()) == [2, 3, 4, 5, 6, 7]
    assert set(done.table.column("reward_format").to_pylist()) == {0.5}
    assert "2 samples are left out" in done.said


def test_nemo_rl_leaves_out_what_it_does_not_train_on(tmp_path, converted):
    path = tmp_path / "train_data_step12.jsonl"
    dumps.nemo_rl(dumps.rollouts(), path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for place, line in enumerate(lines):
        line["sample_loss_mask"] = [float(place % 2)]
        line["filtered_rewards"] = [line["rewards"][0] + 1]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = converted(path)
    assert done.table.column("step").to_pylist() == [12] * 4
    assert done.table.column("reward").to_pylist() == [r.reward + 1 for r in dumps.rollouts()[1::2]]
    assert "sample_loss_mask is 0" in done.said


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


def write_lines(path: Path, lines: list[object]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_trl_sums_its_reward_functions_and_takes_chat(tmp_path, converted, tokenizer):
    trl_table(tmp_path / "a.parquet", chat=True, rewards=2)
    done = converted(tmp_path / "a.parquet", tokenizer=str(tokenizer), allow_retokenize=True)
    prompt, response, reward = text_of(3)
    expected = ids_of(f"user : {prompt} assistant :"), ids_of(f"{response} </s>")
    assert done.table.column("input_ids")[3].as_py() == expected[0] + expected[1]
    assert done.table.column("response_mask")[3].as_py() == [False] * len(expected[0]) + [True] * len(expected[1])
    assert done.table.column("reward")[3].as_py() == 2 * reward + 1
    assert "reward is the sum of reward_0, reward_1" in done.said
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


def test_float16_ids_of_every_width_and_left_padding_go(tmp_path, converted):
    columns = {
        "sequences": pa.array([[0, 0, 7, 8, 9], [0, 1, 2, 3, 4]], type=pa.list_(pa.uint16(), 5)),
        "attention_mask": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
        "action_mask": [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]],
        "returns": pa.array(np.full((2, 5), 0.5, np.float16).tolist(), type=pa.list_(pa.float16())),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = converted(tmp_path / "a.parquet").table
    assert table.column("input_ids").to_pylist() == [[7, 8, 9], [1, 2, 3, 4]]
    assert table.column("returns").to_pylist() == [[0, 0.5, 0.5], [0, 0, 0.5, 0.5]]


def test_a_verl_batch_before_the_rewards_has_its_scores_for_them(tmp_path, converted):
    import pickle

    of = dumps.rollouts()
    batch = dumps.verl_batch(of)
    kept = ("prompts", "responses", "attention_mask", "response_mask", "token_level_scores")
    tensors = {
        name: (str(batch[name].dtype).removeprefix("torch."), tuple(batch[name].shape), batch[name].numpy().tobytes())
        for name in kept
    }
    state = pickle.dumps((((len(of),), None, tensors), {}, {}), protocol=4)
    head = b"\x80\x04\x8c\x0dverl.protocol\x8c\x09DataProto\x93)\x81"
    (tmp_path / "a.pkl").write_bytes(head + state[2:-1] + b"b.")
    table = converted(tmp_path / "a.pkl").table
    expected = sorted(of, key=lambda r: "pq".index(r.uid))
    assert table.column("rewards").to_pylist() == [r.rewards for r in expected]
    assert "uid" not in table.column_names
