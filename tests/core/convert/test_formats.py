"""Every format, from a file as its framework writes it to shards, field by field, and a critic trained on them."""

import os
import pickle
from pathlib import Path
from typing import get_args

import dumps
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import write_fixtures
from conftest import built, fits, fixture, fresh, run

from critic_train.convert.formats import FORMAT_NAMES, TITLES
from critic_train.errors import DataError
from critic_train.settings import DumpFormat

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
    page = (Path(__file__).parents[3] / "docs" / "guides" / "convert.md").read_text()
    assert all(f"| `{name}` |" in page for name in FORMAT_NAMES)
    assert TITLES.startswith("slime .pt, verl DataProto or JSONL, NeMo-RL JSONL, ")


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


def test_bad_files_are_all_named_or_left_out(tmp_path, three):
    (three / "3.pt").write_bytes(b"")
    (three / "4.pt").write_bytes(pickle.dumps(os.getcwd))
    torch.save({"model": torch.zeros(2)}, three / "5.pt")
    (three / "6.jsonl").write_text('{"a": 1}\n')
    (three / "7.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="5 files cannot be used") as caught:
        run(tmp_path / "shards", three)
    assert "3.pt: the file is empty" in caught.value.message
    assert "4.pt: it refers to posix.getcwd" in caught.value.message
    assert "5.pt: is in no known format: it holds a dictionary of model" in caught.value.message
    assert "6.jsonl: is in no known format: its fields are a" in caught.value.message
    done = run(tmp_path / "shards", three, on_bad_file="skip")
    assert done.result["rollouts"] == 60
    assert done.result["files_left_out"]["count"] == 5


def test_a_format_that_was_said_is_held_to(tmp_path, three):
    with pytest.raises(DataError, match="is not what --from slime reads"):
        run(tmp_path / "shards", three, source_format="slime")
    dumps.slime_train(dumps.rollouts(), tmp_path / "a.pt")
    assert run(tmp_path / "said", tmp_path / "a.pt", source_format="slime").result["rollouts"] == 8
    with pytest.raises(DataError, match="is not what --from verl reads"):
        run(tmp_path / "other", tmp_path / "a.pt", source_format="verl")
