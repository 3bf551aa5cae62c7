"""A critic in memory gives the values that `predict` writes, and refuses what it cannot read."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import branching_rollouts, rollouts_of, small_config, write_shard

from critic_train.errors import ConfigError, DataError, MachineError, ModelError
from critic_train.inference import LoadedCritic, load_critic
from critic_train.predict.predict import predict
from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import write_checkpoint
from critic_train.settings import PredictSettings
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic

PROMPT = 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    made = build_critic(small_config("Qwen2"), seed=0)
    with torch.no_grad():
        made.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("critic")
    save_critic(made, path, None)
    return path


@pytest.fixture(scope="module")
def critic(directory) -> LoadedCritic:
    return load_critic(directory, device="cpu", max_tokens=64)


def sequences_of(rollouts: Rollouts) -> list[np.ndarray]:
    return np.split(rollouts.input_ids, rollouts.offsets[1:-1])


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    """Rollouts that share prompts and more, all tokens after the first four response tokens."""
    sequences = sequences_of(branching_rollouts())
    return rollouts_of(sequences, [PROMPT] * len(sequences))


def test_values_are_those_that_predict_writes(directory, critic, rollouts, tmp_path):
    write_shard(tmp_path / "data" / "a.parquet", rollouts)
    settings = PredictSettings(
        data=[str(tmp_path / "data")], model=str(directory), to=str(tmp_path / "to"), device="cpu", max_tokens=64
    )
    list(predict(settings))
    written = pq.read_table(tmp_path / "to" / "a.parquet").column("values").to_pylist()
    given = critic.values(sequences_of(rollouts), [PROMPT] * len(rollouts))
    assert [row[:PROMPT] for row in written] == [[0.0] * PROMPT] * len(written)
    assert [values.tolist() for values in given] == [row[PROMPT:] for row in written]
    assert {values.dtype for values in given} == {np.dtype(np.float32)}


def test_the_value_of_a_token_is_read_off_the_state_before_it(directory, critic, rollouts):
    """By hand, with transformers alone: hidden states of one rollout, then the head."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    ids = sequences_of(rollouts)[0]
    weights = load_file(directory / "model.safetensors")
    with torch.no_grad():
        states = AutoModel.from_pretrained(directory)(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
        expected = states[PROMPT - 1 : -1] @ weights["score.weight"][0] + weights["score.bias"]
    (values,) = critic.values([ids], [PROMPT])
    np.testing.assert_allclose(values, expected.numpy(), atol=1e-5)


def test_lists_and_arrays_prompts_of_any_length_and_no_rollouts(critic, rollouts):
    ids = [sequence.tolist() for sequence in sequences_of(rollouts)]
    prompts = [1 + number % 5 for number in range(len(ids))]
    values = critic.values(ids, prompts)
    assert [len(each) for each in values] == [len(row) - prompt for row, prompt in zip(ids, prompts, strict=True)]
    whole = critic.values(ids, [1] * len(ids))
    for each, all_of_it, prompt in zip(values, whole, prompts, strict=True):
        np.testing.assert_allclose(each, all_of_it[prompt - 1 :], atol=1e-5)
    assert critic.values([], []) == []


def test_the_directory_and_the_configuration_are_there(directory, critic):
    assert critic.path == directory
    assert critic.config.model_type == "qwen2"


def test_packing_is_tried_again_for_a_longer_rollout_or_many_more_of_them(directory, monkeypatch):
    from critic_train import inference

    tried = []
    select = inference.select_packing
    monkeypatch.setattr(
        inference,
        "select_packing",
        lambda critic, sample, *rest, **more: tried.append(more["tokens"]) or select(critic, sample, *rest, **more),
    )
    critic = load_critic(directory, device="cpu")
    for length in (8, 8, 5, 9):
        critic.values([list(range(1, length + 1))], [2])
    assert tried == [16, 18]
    critic.values([[1, 2, 3]] * 6, [1] * 6)
    critic.values([[1, 2, 3]] * 9, [1] * 9)
    assert tried == [16, 18, 54]


@pytest.mark.parametrize(
    ("ids", "prompt", "error"),
    [
        ([5, 6, 700], 1, "rollout 1: token id 700 at position 2 is not from 0 to 127"),
        ([5, -6, 7], 1, "rollout 1: token id -6 at position 1"),
        ([5, 6], 2, "rollout 1: the prompt length must be from 1 to 1, one below its 2 tokens, not 2"),
        ([5, 6], 0, "the prompt length must be from 1 to 1"),
        ([], 1, "rollout 1: "),
        ([0.5, 1.0], 1, "rollout 1: token ids must be a list of ints, not float64 with shape (2,)"),
        ([[1, 2], [3, 4]], 1, "must be a list of ints, not int64 with shape (2, 2)"),
        ([5] * 600, 1, "600 tokens are more than the 512 that the model has positions for"),
    ],
)
def test_rollouts_that_cannot_be_read(critic, ids, prompt, error):
    with pytest.raises(DataError) as raised:
        critic.values([[1, 2, 3], ids], [1, prompt])
    assert error in raised.value.message


def test_all_bad_rollouts_are_counted(critic):
    with pytest.raises(DataError) as raised:
        critic.values([[1]] * 12, [1] * 12)
    assert raised.value.message.splitlines()[-1] == "and 2 more"


def test_wrong_arguments(directory, critic):
    with pytest.raises(ConfigError, match="token_ids has 2 rollouts, prompt_lengths 1"):
        critic.values([[1, 2], [3, 4]], [1])
    with pytest.raises(ConfigError, match="--max-tokens must be at least 1"):
        load_critic(directory, max_tokens=0)
    with pytest.raises(ConfigError, match="device"):
        load_critic(directory, device="tpu")
    with pytest.raises(MachineError):
        load_critic(directory, device="cuda:99")
    with pytest.raises(ModelError, match="no model directory"):
        load_critic("nowhere")


def test_values_that_are_not_finite_are_refused(directory):
    critic = load_critic(directory, device="cpu")
    with torch.no_grad():
        critic._critic.head.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        critic.values([[1, 2, 3]], [1])


def test_a_run_is_loaded_by_its_checkpoint(directory, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    written = write_checkpoint(
        tmp_path / "checkpoints", 7, lambda path: shutil.copytree(directory, path, dirs_exist_ok=True)
    )
    assert load_critic(tmp_path, device="cpu").path == written
