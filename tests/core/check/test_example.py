"""One rollout read back: the policy's part is what the mask marks."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import critic_train
from critic_train.errors import ModelError
from critic_train.events import RunEnded
from critic_train.settings import CheckSettings

WORDS = ["zero", "one", "two", "three", "four", "five"]


@pytest.fixture
def shard(tmp_path):
    columns = {"input_ids": [[1, 2, 3, 4, 5]], "response_mask": [[0, 1, 1, 0, 1]], "reward": [1.0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def example(shard, **settings):
    events = list(critic_train.check(CheckSettings(data=[str(shard)], **settings)))
    return next(event for event in events if isinstance(event, RunEnded)).result["example"]


def test_ids_in_parts(shard):
    assert example(shard) == [
        {"policy": False, "tokens": 1, "ids": [1]},
        {"policy": True, "tokens": 2, "ids": [2, 3]},
        {"policy": False, "tokens": 1, "ids": [4]},
        {"policy": True, "tokens": 1, "ids": [5]},
    ]


def test_text_in_parts(shard, tmp_path):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="zero"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tokenizer")
    parts = example(shard, tokenizer=str(tmp_path / "tokenizer"))
    assert [(part["text"], part["policy"]) for part in parts] == [
        ("one", False), ("two three", True), ("four", False), ("five", True),
    ]  # fmt: skip


def test_long_parts_are_cut_in_the_middle(tmp_path):
    count = 100
    columns = {"input_ids": [list(range(count))], "response_mask": [[0] + [1] * (count - 1)], "reward": [1.0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    _, response = example(tmp_path / "a.parquet")
    assert response == {"policy": True, "tokens": 99, "ids": [*range(1, 13), "...", *range(88, 100)]}


def test_a_folder_without_a_tokenizer_is_refused(shard, tmp_path):
    with pytest.raises(ModelError, match="--tokenizer"):
        example(shard, tokenizer=str(tmp_path))
