"""Rollouts chosen by uid, or the first of the data, or a text: values by the critic, old values and returns beside."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_critics import critic_of
from support import readable_rollouts, write_shard

from critic_train.errors import ConfigError, DataError
from critic_train.events import run_to_end
from critic_train.settings import ShowSettings
from critic_train.show.show import show
from critic_train.stopping import StopRequest
from critic_train.weights.saving import save_critic


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_critic(critic_of("Llama"), folder, None)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six groups of four, with uids "0" to "5", in two files."""
    folder = tmp_path_factory.mktemp("data")
    rollouts = readable_rollouts(6)
    write_shard(folder / "a.parquet", rollouts.take(np.arange(0, 14)))
    write_shard(folder / "b.parquet", rollouts.take(np.arange(14, 24)))
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of whole words: "a" is 1, "b" 2, ..."""
    folder = tmp_path_factory.mktemp("words")
    vocabulary = {"[UNK]": 0} | {chr(96 + number): number for number in range(1, 27)}
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def shown(model=None, **settings):
    return run_to_end(show(ShowSettings(model=[str(model)] if model else [], device="cpu", **settings))).result


def test_a_group_by_its_uid_from_whichever_file(model, data):
    result = shown(model, data=[str(data)], uid=["3", "1"])
    records = result["rollouts"]
    assert sorted((record["uid"], record["of"]) for record in records) == [("1", 4)] * 4 + [("3", 4)] * 4
    three = [record for record in records if record["uid"] == "3"]
    assert [(record["file"].rsplit("/", 1)[1], record["row"]) for record in three] == [
        ("a.parquet", 12),
        ("a.parquet", 13),
        ("b.parquet", 0),
        ("b.parquet", 1),
    ]


def test_values_are_those_of_the_state_before_each_token(model, data):
    """By transformers' class for token classification alone."""
    from transformers import AutoModelForTokenClassification

    theirs = AutoModelForTokenClassification.from_pretrained(model).eval()
    rollouts = readable_rollouts(6)
    for number, record in enumerate(shown(model, data=[str(data)], show=3)["rollouts"]):
        start, stop = rollouts.offsets[number], rollouts.offsets[number + 1]
        assert record["input_ids"] == rollouts.input_ids[start:stop].tolist()
        mask = rollouts.response_mask[start:stop]
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([record["input_ids"]])).logits[0, :, 0].numpy()
        expected = logits[np.flatnonzero(mask) - 1]
        values = [value for value in record["values"] if value is not None]
        np.testing.assert_allclose(values, expected, atol=1e-4)
        assert [value is not None for value in record["values"]] == mask.tolist()
        assert record["mean_value"] == pytest.approx(expected.mean(), abs=1e-4)
        assert {value for value in record["old_values"] if value is not None} == {0.5}
        assert {value for value in record["returns"] if value is not None} == {rollouts.returns[start]}
    json.dumps(record)


def test_without_a_model_the_stored_values_are_shown(data):
    record = shown(data=[str(data)], show=1)["rollouts"][0]
    assert {value for value in record["values"] if value is not None} == {0.5}
    assert record["old_values"] is None


def test_returns_are_computed_from_rewards_where_asked(model, tmp_path):
    rollouts = readable_rollouts(2)
    path = write_shard(tmp_path / "a.parquet", rollouts, without=["returns"])
    table = pq.read_table(path)
    pq.write_table(table.append_column("reward", pa.array(np.arange(len(table)) / 8.0)), path)
    assert shown(model, data=[str(path)])["rollouts"][0]["returns"] is None
    records = shown(model, data=[str(path)], returns="mc")["rollouts"]
    assert [record["mean_return"] for record in records] == [number / 8 for number in range(len(records))]


def test_no_more_of_a_group_than_asked_for_but_all_are_counted(model, data):
    records = shown(model, data=[str(data)], uid=["2"], show=2)["rollouts"]
    assert [(record["uid"], record["of"]) for record in records] == [("2", 4)] * 2


def test_a_text_after_a_prompt(model, words):
    record = shown(model, text=["d e f"], prompt="a b c", tokenizer=str(words))["rollouts"][0]
    assert record["input_ids"] == [1, 2, 3, 4, 5, 6]
    assert record["response_mask"] == [False] * 3 + [True] * 3
    assert "".join(record["texts"]) == "a b c d e f"
    assert (record["uid"], record["file"], record["returns"]) == (None, None, None)


def test_the_first_token_of_a_text_alone_has_no_state_before_it(model, words):
    record = shown(model, text=["d e f"], tokenizer=str(words))["rollouts"][0]
    assert record["response_mask"] == [False, True, True]
    with pytest.raises(ConfigError, match="too few tokens"):
        shown(model, text=["d"], tokenizer=str(words))


def test_a_uid_that_is_not_there_is_told_with_some_that_are(model, data):
    with pytest.raises(DataError, match="no rollout has uid '17'") as caught:
        shown(model, data=[str(data)], uid=["1", "17"])
    assert caught.value.hint == "uids there are 0, 1, 2, 3, 4, ..."


def test_shards_without_uids_say_so(model, tmp_path):
    path = write_shard(tmp_path / "a.parquet", readable_rollouts(2), without=["uid"])
    with pytest.raises(DataError) as caught:
        shown(model, data=[str(path)], uid=["1"])
    assert "no uid column" in caught.value.hint


def test_a_text_needs_a_tokenizer(model):
    with pytest.raises(ConfigError, match=r"no tokenizer\.json beside"):
        shown(model, text=["a"])


def test_a_stop_ends_it(model, data):
    settings = ShowSettings(model=[str(model)], data=[str(data)], device="cpu")
    ended = run_to_end(show(settings, StopRequest(signal_number=15)))
    assert (ended.status, ended.signal_number) == ("interrupted", 15)
