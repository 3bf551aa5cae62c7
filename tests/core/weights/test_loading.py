"""Directories in and out: what is read, what is refused, what other programs load."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from critic_train.errors import ModelError
from critic_train.model.critic import Critic
from critic_train.weights.loading import build_critic, load_critic, read_model
from critic_train.weights.saving import save_critic


def trained(family: str) -> Critic:
    """A critic whose head is not at its start."""
    critic = build_critic(small_config(family), seed=0)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        critic.head.bias.fill_(0.25)
    return critic


def test_a_causal_lm_gives_its_trunk_and_no_head(tmp_path):
    model = AutoModelForCausalLM.from_config(small_config("Qwen2"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    source = read_model(tmp_path)
    assert source.head is None
    critic = load_critic(source)
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    theirs = model.model.state_dict()
    assert all(torch.equal(tensor, theirs[name].float()) for name, tensor in critic.trunk.state_dict().items())


def test_a_head_that_exists_is_never_made_anew(tmp_path):
    model = AutoModelForSequenceClassification.from_config(small_config("Llama", num_labels=1))
    with torch.no_grad():
        model.score.weight.fill_(0.125)
    model.save_pretrained(tmp_path)
    critic = load_critic(read_model(tmp_path))
    assert torch.equal(critic.head.weight, torch.full((1, 64), 0.125))
    assert critic.head.bias.item() == 0.0


@pytest.mark.parametrize("name", ["v_head.summary", "value_head", "v_head"])
def test_heads_of_other_frameworks_are_found(name, tmp_path):
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"{name}.weight": torch.full((1, 64), 0.5), f"{name}.bias": torch.full((1,), 2.0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = read_model(tmp_path)
    assert source.head == name
    critic = load_critic(source)
    assert critic.head.weight.unique().tolist() == [0.5]
    assert critic.head.bias.tolist() == [2.0]


def test_a_token_classifier_without_its_head_is_refused(tmp_path):
    save_critic(trained("Llama"), tmp_path, None)
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith("score")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="has a value head, but its weights hold none"):
        read_model(tmp_path)


def test_a_classifier_with_several_labels_is_refused(tmp_path):
    AutoModelForSequenceClassification.from_config(small_config("Llama", num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"score.weight has shape \[3, 64\]"):
        read_model(tmp_path)


def test_missing_weights_are_named(tmp_path):
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight: missing"):
        load_critic(read_model(tmp_path))


def spoil_nothing(path: Path) -> None:
    (path / "config.json").unlink()


def spoil_weights_pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def spoil_weights_cut(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def spoil_config_text(path: Path) -> None:
    (path / "config.json").write_text("{")


def spoil_remote_code(path: Path) -> None:
    raw = json.loads((path / "config.json").read_text())
    raw |= {"model_type": "my_model", "auto_map": {"AutoConfig": "evil.Config"}}
    (path / "config.json").write_text(json.dumps(raw))
    (path / "evil.py").write_text(f"open({str(path / 'ran')!r}, 'w')")


def spoil_path_escape(path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_nothing, "has no config.json"),
        (spoil_weights_pickled, "has no model.safetensors"),
        (spoil_weights_cut, "is damaged or no safetensors file"),
        (spoil_config_text, "cannot be read"),
        (spoil_remote_code, "asks for code of its own"),
        (spoil_path_escape, "names a file outside its directory"),
    ],
)
def test_unusable_directories_are_refused_with_the_reason(spoil, said, tmp_path):
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ModelError, match=said):
        load_critic(read_model(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_fresh_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (build_critic(small_config("Llama"), seed=s).trunk.embed_tokens.weight for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors hold NaN or infinite numbers: layers\.1\.mlp\.up_proj\.weight"):
        load_critic(read_model(tmp_path))


def test_numbers_whose_sum_alone_is_not_finite_are_taken(tmp_path):
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_critic(read_model(tmp_path))
