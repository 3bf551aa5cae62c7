"""What is written is what transformers loads, tokenizer and all."""

import json

import numpy as np
import pytest
import torch
from architectures import TEXT, text_config
from support import branching_rollouts, small_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTokenClassification,
)

from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.microbatches import predict_values
from critic_train.weights.loading import build_critic, load_critic, read_model
from critic_train.weights.saving import (
    add_old_rope_entries,
    exported_class,
    loads_for_token_classification,
    save_critic,
)

CPU = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)


def trained(family: str) -> Critic:
    """A critic whose head is not at its start."""
    critic = build_critic(small_config(family), seed=0)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        critic.head.bias.fill_(0.25)
    return critic


def logits_alone(model: torch.nn.Module) -> np.ndarray:
    """float32 [M]: the values of all response tokens, one rollout at a time through another program's model."""
    rollouts = branching_rollouts()
    found = []
    for start, stop in zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True):
        ids = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :, 0].numpy()
        found.append(logits[np.flatnonzero(rollouts.response_mask[start:stop]) - 1])
    return np.concatenate(found)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "GPTNeoX", "GPT2", "Qwen3Moe"])
def test_transformers_loads_a_checkpoint_whole_and_gives_the_same_values(family, tmp_path):
    critic = trained(family)
    assert loads_for_token_classification(critic)
    save_critic(critic, tmp_path, None)
    model, report = AutoModelForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    ours = predict_values(critic, branching_rollouts(), CPU, forest=True)[branching_rollouts().response_mask]
    assert np.abs(logits_alone(model.eval()) - ours).max() <= 1e-5


@pytest.mark.parametrize("family", ["Gemma3Text", "Olmo2", "Olmo3", "Granite", "Cohere2"])
def test_without_a_token_classification_class_the_trunk_and_head_are_written(family, tmp_path):
    critic = trained(family)
    assert not loads_for_token_classification(critic)
    save_critic(critic, tmp_path, None)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [exported_class(critic)]
    loaded = load_critic(read_model(tmp_path))
    assert torch.equal(loaded.head.weight, critic.head.weight)
    assert torch.equal(loaded.head.bias, critic.head.bias)
    _, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) == {"score.weight", "score.bias"}


def test_the_tokenizer_travels_with_the_checkpoint(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    (base / "tokenizer.json").write_text("{}")
    (base / "secret.txt").write_text("stays")
    save_critic(trained("Llama"), out, base)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "secret.txt").exists()


def test_all_files_of_a_directory_can_be_read_by_those_whom_the_umask_lets(tmp_path):
    save_critic(trained("Llama"), tmp_path, None)
    usual = tmp_path / "usual"
    usual.write_bytes(b"")
    assert {file.stat().st_mode for file in tmp_path.iterdir() if file.is_file()} == {usual.stat().st_mode}


@pytest.mark.parametrize(
    ("family", "rope", "expected"),
    [
        ("Llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            "Llama",
            {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0},
            {"rope_theta": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        (
            "Phi",
            {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 3e4, "partial_rotary_factor": 0.5},
        ),
    ],
)
def test_transformers_4_finds_the_rotary_entries_that_it_reads(family, rope, expected, tmp_path):
    """Under the names of transformers 4.46; transformers 5 reads what it read without them."""
    critic = build_critic(small_config(family, rope_parameters=rope), seed=0)
    before = dict(critic.trunk.config.rope_parameters)
    save_critic(critic, tmp_path, None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config.get(name) for name in expected} == expected
    assert dict(read_model(tmp_path).config.rope_parameters) == before


def test_another_base_for_sliding_attention_has_its_own_entry(tmp_path):
    """Gemma 3, by the names of transformers 4.50."""
    critic = build_critic(small_config("Gemma3Text"), seed=0)
    before = critic.trunk.config.rope_parameters
    save_critic(critic, tmp_path, None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == before["full_attention"]["rope_theta"]
    assert config["rope_local_base_freq"] == before["sliding_attention"]["rope_theta"]
    assert read_model(tmp_path).config.rope_parameters == before


@pytest.mark.parametrize("name", [*TEXT])
def test_transformers_5_reads_the_rotary_parameters_that_were_written(name, tmp_path):
    """Whatever is added for transformers 4; Gemma 4 takes `rope_scaling` for all of `rope_parameters`."""
    config = text_config(name)
    config.save_pretrained(tmp_path)
    before = getattr(AutoConfig.from_pretrained(tmp_path), "rope_parameters", None)
    add_old_rope_entries(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), "rope_parameters", None) == before
